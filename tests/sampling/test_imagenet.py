from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge.sampling.imagenet import (
    CLASSES,
    class_prompt,
    find_class,
    format_classes,
    parse_classes,
    val_first_five,
)


def test_classes_are_the_thousand_in_the_order_of_their_synsets() -> None:
    assert [entry.index for entry in CLASSES] == list(range(1000))
    synsets = [entry.synset for entry in CLASSES]
    assert synsets == sorted(set(synsets))
    assert len({entry.atc_name for entry in CLASSES}) == 1000
    assert len({entry.short_name for entry in CLASSES}) == 1000
    assert not [entry for entry in CLASSES if "," in entry.short_name]


def test_atc_edits_three_names() -> None:
    assert CLASSES[7].atc_name == "male chicken, cock"
    assert CLASSES[134].atc_name == "crane, a type of bird"
    assert CLASSES[517].atc_name == "crane, construction equipment"


def test_synsets_agree_with_an_independent_listing(shared: Path) -> None:
    files = sorted((shared / "imagenet-sample").glob("n*_*.*"))
    assert len(files) == 1000
    assert [file.name.partition("_")[0] for file in files] == [c.synset for c in CLASSES]


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ((0,), "A high quality photograph of a tench, Tinca tinca."),
        ((7,), "A high quality photograph of a male chicken, cock."),
        ((0, "a {class} {class}"), "a tench, Tinca tinca tench, Tinca tinca"),
        ((0, "a photo of a {class}", "short"), "a photo of a tench"),
        ((517, "{class}", "short"), "construction crane"),
    ],
)
def test_prompt(arguments: tuple[int, str], prompt: str) -> None:
    assert class_prompt(*arguments) == prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "a class"), "`prompt_template` must contain {class}"),
        ((1000,), "`class_index` must be in"),
        ((-1,), "`class_index` must be in"),
        ((0, "{class}", "long"), "`class_names` must be"),
    ],
)
def test_bad_prompt_arguments(arguments: tuple[int, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_prompt(*arguments)  # type: ignore[arg-type]


def test_every_class_is_found_by_each_of_its_full_names() -> None:
    for entry in CLASSES:
        for text in (str(entry.index), entry.synset, entry.atc_name, entry.short_name):
            assert find_class(text) is entry


def test_any_synonym_in_any_case_finds_its_class() -> None:
    assert find_class("Tinca Tinca").index == 0
    assert find_class("  GOLDEN   retriever ").index == 207
    assert find_class("cock").index == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", r"ambiguous: crane bird \(134\), construction crane \(517\)"),
        ("magpe", "got 'magpe'. Close names: magpie"),
        ("1000", "got '1000'.$"),
        ("-1", "got '-1'"),
        ("", "got ''"),
    ],
)
def test_unknown_and_ambiguous_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_class(text)


@given(st.sets(st.integers(0, 999), min_size=1))
def test_class_lists_round_trip(indices: set[int]) -> None:
    wanted = tuple(sorted(indices))
    assert parse_classes(format_classes(wanted)) == wanted


def test_class_lists_mix_ranges_and_names() -> None:
    assert parse_classes("5, 0-2,magpie,n01440764") == (0, 1, 2, 5, 18)


@pytest.mark.parametrize("text", ["", " , ", "3-1", "0-1000", "0-2,foo"])
def test_bad_class_lists(text: str) -> None:
    with pytest.raises(ValueError, match="Class"):
        parse_classes(text)


def test_reference_images_are_five_per_class_and_distinct() -> None:
    rows = val_first_five()
    assert rows[0] == (293, 2138, 3014, 6697, 7197)
    assert {len(row) for row in rows} == {5}
    assert all(row == tuple(sorted(row)) for row in rows)
    numbers = {number for row in rows for number in row}
    assert len(numbers) == 5000
    assert min(numbers) >= 1
    assert max(numbers) <= 12130
