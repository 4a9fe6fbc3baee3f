from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge.fid.reference import (
    MANIFEST,
    ReferenceSetError,
    make_reference,
    verify_reference,
)
from sd_tokenmerge.sampling.imagenet import CLASSES, val_first_five
from tests.fid.pictures import tiny_jpeg, write_validation_set
from tests.stored_json import JSON, MANY, places, replaced

KNOWN = val_first_five()
CLASS_OF = {number: index for index, numbers in enumerate(KNOWN) for number in numbers}


def name(number: int, ending: str = "") -> str:
    return f"ILSVRC2012_val_{number:08d}{ending}.JPEG"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet") / "val"
    write_validation_set(folder, further=range(40_000, 40_050))
    return folder


@pytest.fixture
def val(flat: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `flat` of one's own, by hard links."""
    shutil.copytree(flat, tmp_path / "data" / "val", copy_function=os.link)
    yield tmp_path / "data" / "val"
    shutil.rmtree(tmp_path / "data")


def rearrange(val: Path, layout: str) -> None:
    for path in sorted(val.iterdir()):
        number = int(path.stem[-8:])
        synset = CLASSES[CLASS_OF.get(number, 0)].synset
        if layout == "hub":
            path.rename(val / name(number, f"_{synset}"))
        elif layout == "lower case":
            path.rename(val / name(number).replace("JPEG", "jpg"))
        elif layout == "synset folders":
            (val / synset).mkdir(exist_ok=True)
            path.rename(val / synset / path.name)


@pytest.mark.parametrize("layout", ["flat", "hub", "lower case", "synset folders"])
def test_every_layout_gives_the_same_set(layout: str, val: Path, tmp_path: Path) -> None:
    rearrange(val, layout)
    (val / "val.txt").write_text("labels are not needed")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    result = make_reference(val.parent, out, progress=lambda *counts: seen.append(counts))
    assert len(result.images) == 5000
    assert seen == [(done, 5000) for done in range(1, 5001)]
    for number in (*KNOWN[0], *KNOWN[999]):
        assert (out / name(number)).read_bytes() == tiny_jpeg(number)
    assert len(list(out.iterdir())) == 5001
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert lines[0] == {
        "file": "ILSVRC2012_val_00000293.JPEG",
        "class_index": 0,
        "synset": "n01440764",
        "sha256": hashlib.sha256(tiny_jpeg(293)).hexdigest(),
    }
    assert [line["class_index"] for line in lines] == [i // 5 for i in range(5000)]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_links_point_to_the_source(val: Path, tmp_path: Path) -> None:
    make_reference(val, tmp_path / "out", link=True)
    link = tmp_path / "out" / name(293)
    assert link.is_symlink()
    assert link.resolve() == val / name(293)


def test_a_set_that_is_there_is_verified(val: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_reference(val, out)
    assert make_reference(tmp_path / "gone", out).reused
    (out / name(293)).write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"val_00000293\.JPEG' does not match its hash in the manifest"
    ):
        make_reference(val, out)
    (out / name(293)).unlink()
    with pytest.raises(ValueError, match=r"1 files are missing.*val_00000293"):
        verify_reference(out)
    for damage in (b"{}\n", b"[1]\n", b"\xff\n", b"[" * 100_000):
        (out / MANIFEST).write_bytes(damage)
        with pytest.raises(ValueError, match="is not a manifest"):
            verify_reference(out)
    (out / MANIFEST).write_text("")
    with pytest.raises(ValueError, match="does not list the 5,000"):
        verify_reference(out)


@MANY
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(ValueError, match=MANIFEST):
        verify_reference(tmp_path)


def expected_lines() -> list[dict[str, object]]:
    return [
        {"file": name(number), "class_index": index, "synset": "n", "sha256": "0" * 64}
        for index, numbers in enumerate(KNOWN)
        for number in numbers
    ]


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_manifest(tmp_path: Path, data: st.DataObject) -> None:
    lines = expected_lines()
    path = data.draw(st.sampled_from(places(lines[7])))
    lines[7] = replaced(lines[7], path, data.draw(JSON))
    (tmp_path / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"manifest|5,000"):
        verify_reference(tmp_path)


def test_a_folder_that_is_something_else_is_left_alone(val: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new folder or a reference set.*no manifest"):
        make_reference(val, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_missing_image_is_named(val: Path, tmp_path: Path) -> None:
    (val / name(2138)).unlink()
    (val / name(7197)).unlink()
    with pytest.raises(ReferenceSetError, match=r"2 of the 5,000 .* first is .*00002138\.JPEG"):
        make_reference(val, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_there_twice_is_refused(val: Path, tmp_path: Path) -> None:
    shutil.copytree(val, val.parent / "copy")
    with pytest.raises(ReferenceSetError, match=r"must be in `source` once, found .*copy.* and "):
        make_reference(val.parent, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", tiny_jpeg(293)[:-20], b"<html>"])
def test_a_damaged_image_is_named(content: bytes, val: Path, tmp_path: Path) -> None:
    (val / name(7197)).unlink()  # a hard link
    (val / name(7197)).write_bytes(content)
    with pytest.raises(ReferenceSetError, match=r"val_00007197\.JPEG' is damaged"):
        make_reference(val, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_copy_leaves_nothing(
    val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        make_reference(val, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_killed_process_left_is_removed(val: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial-x1y2z3"
    leftover.mkdir()
    (leftover / name(293)).write_bytes(b"")
    (tmp_path / ".out-of-mine").mkdir()
    make_reference(val, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-of-mine", "data", "out"]


def test_the_source_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ReferenceSetError, match="`source` must be an existing folder"):
        make_reference(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReferenceSetError, match="5,000 of the 5,000 reference images are not in"):
        make_reference(tmp_path / "empty", tmp_path / "out")
