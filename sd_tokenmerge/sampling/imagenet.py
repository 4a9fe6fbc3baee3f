"""The 1,000 ImageNet classes: indices, synsets, names, prompts.

Each class has the two names that papers put into prompts: ATC's list of all synonyms ("tench, Tinca
tinca"), and one short name ("tench"). imagenet_LICENSE.txt has source and licence of the data.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal

PAPER_TEMPLATE = "A high quality photograph of a {class}."
"""ToMe-SD's and ATC's prompt."""

NameStyle = Literal["atc", "short"]


@dataclass(frozen=True)
class ImagenetClass:
    """One class of ImageNet-1k."""

    index: int
    """0 to 999, in the order of the synsets."""
    synset: str
    """WordNet id, e.g. `n01440764`; the folder's name in the data set."""
    atc_name: str
    """All synonyms, as ATC prompts with them."""
    short_name: str
    """The first synonym, unique among the classes."""


def _read_classes() -> tuple[ImagenetClass, ...]:
    text = files(__package__).joinpath("imagenet_classes.csv").read_text(encoding="utf-8")
    rows = csv.reader(text.splitlines()[1:])
    return tuple(ImagenetClass(int(index), *names) for index, *names in rows)


CLASSES: tuple[ImagenetClass, ...] = _read_classes()
"""All classes, by index."""


def class_prompt(
    class_index: int, prompt_template: str = PAPER_TEMPLATE, class_names: NameStyle = "atc"
) -> str:
    """The prompt for one class.

    Args:
        class_index: 0 to 999.
        prompt_template: text with `{class}` in place of the name.
        class_names: `"atc"` for all synonyms (ATC's protocol), `"short"` for one name.

    Raises:
        ValueError: the template has no `{class}`, or an argument is out of range.
    """
    if "{class}" not in prompt_template:
        raise ValueError(f"`prompt_template` must contain {{class}}, got {prompt_template!r}.")
    if class_names not in ("atc", "short"):
        raise ValueError(f"`class_names` must be 'atc' or 'short', got {class_names!r}.")
    if not 0 <= class_index < len(CLASSES):
        raise ValueError(f"`class_index` must be in [0, {len(CLASSES)}), got {class_index}.")
    entry = CLASSES[class_index]
    name = entry.atc_name if class_names == "atc" else entry.short_name
    return prompt_template.replace("{class}", name)


def find_class(text: str) -> ImagenetClass:
    """Look up a class by its index, synset, full name, short name or any unambiguous synonym.

    Args:
        text: such as `"18"`, `"n01582220"` or `"magpie"`; names are case-insensitive.

    Raises:
        ValueError: no class or several classes have that name; close names are suggested.
    """
    wanted = " ".join(text.split())
    if wanted.isdecimal() and int(wanted) < len(CLASSES):
        return CLASSES[int(wanted)]
    for entry in CLASSES:
        if wanted in (entry.synset, entry.atc_name, entry.short_name):
            return entry
    found = _by_name().get(wanted.casefold(), ())
    if len(found) == 1:
        return CLASSES[found[0]]
    if found:
        choices = ", ".join(f"{CLASSES[i].short_name} ({i})" for i in found)
        raise ValueError(f"Class {text!r} is ambiguous: {choices}.")
    names = [name for name in _by_name() if not name.startswith("n0")]
    close = [] if wanted.isdecimal() else get_close_matches(wanted.casefold(), names, n=3)
    hint = f" Close names: {', '.join(close)}." if close else ""
    raise ValueError(
        f"Class must be an ImageNet-1k index (0 to 999), synset or name, got {text!r}.{hint}"
    )


def parse_classes(text: str) -> tuple[int, ...]:
    """Parse a list of classes such as `"0-4,18,goldfish,n01582220"` into sorted, distinct indices.

    Raises:
        ValueError: an entry is not a class, or a range is empty or out of [0, 999].
    """
    indices: set[int] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = entry.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            if not int(first) <= int(last) < len(CLASSES):
                raise ValueError(f"Class range must be within 0-999 and ascending, got {entry!r}.")
            indices.update(range(int(first), int(last) + 1))
        else:
            indices.add(find_class(entry).index)
    if not indices:
        raise ValueError(f"Classes must name at least one class, got {text!r}.")
    return tuple(sorted(indices))


def format_classes(indices: tuple[int, ...]) -> str:
    """The shortest text that `parse_classes` reads back: `(0, 1, 2, 18) -> "0-2,18"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


@cache
def val_first_five() -> tuple[tuple[int, ...], ...]:
    """The reference images of ToMe-SD and ATC: the first five validation images of each class.

    Returns:
        For each class the numbers in `ILSVRC2012_val_<number, 8 digits>.JPEG`, ascending.
    """
    text = files(__package__).joinpath("imagenet_val_first5.txt").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(tuple(int(number) for number in row.split()) for row in rows)


@cache
def _by_name() -> dict[str, tuple[int, ...]]:
    """The classes of every case-folded name; full names take precedence over synonyms."""
    full: dict[str, tuple[int, ...]] = {}
    synonyms: dict[str, tuple[int, ...]] = {}
    for entry in CLASSES:
        for name in {entry.synset, entry.atc_name.casefold(), entry.short_name.casefold()}:
            full[name] = (*full.get(name, ()), entry.index)
        for name in {part.strip().casefold() for part in entry.atc_name.split(",")}:
            synonyms[name] = (*synonyms.get(name, ()), entry.index)
    return synonyms | full
