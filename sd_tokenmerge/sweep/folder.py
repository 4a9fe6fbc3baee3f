"""A sweep's folder: run folders, `sweep.json` with the planned settings, and the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sd_tokenmerge.files import path_inside, read_json, write_atomically
from sd_tokenmerge.sampling.plan import MAX_IMAGES

RUNS = "runs"
"""Folder of the run folders."""
SWEEP_FILE = "sweep.json"
TABLES = ("table.md", "table.csv", "table.json", "table.tex")
PICTURES = ("distance.png", "change.png", "contact_sheet.jpg", "side_by_side.png")
RESULT_FILES = (*TABLES, *PICTURES, "index.html")
"""All result files of a sweep; it removes no others."""


@dataclass(frozen=True)
class PlannedSetting:
    """One setting of a sweep.

    Attributes:
        folder: name of its run folder in `RUNS`.
        method: its method string.
        keep_rate: its keep rate.
        images: number of images.
    """

    folder: str
    method: str
    keep_rate: float
    images: int

    def __post_init__(self) -> None:
        """Check what was read from a file.

        Raises:
            TypeError: a value is of the wrong type.
            ValueError: a number is out of range.
        """
        texts = isinstance(self.folder, str) and isinstance(self.method, str)
        if not texts or type(self.images) is not int or type(self.keep_rate) not in (int, float):
            raise TypeError(f"{self} has a value of the wrong type")
        if not 0 < self.keep_rate <= 1 or not 0 < self.images <= MAX_IMAGES:
            raise ValueError(f"{self} has a number out of range")


def require_sweep_folder(folder: Path) -> None:
    """Refuse a folder with other files than a sweep's.

    Raises:
        ValueError: it is neither empty nor a sweep's.
        OSError: it is not a folder.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and SWEEP_FILE not in names and names != {RUNS}:
        raise ValueError(
            f"`out` must be a new or empty folder, or hold a sweep ({SWEEP_FILE}), got "
            f"{str(folder)!r} with {min(names)!r} in it."
        )


def write_plan(folder: Path, settings: Sequence[PlannedSetting]) -> None:
    """Write `sweep.json`."""
    document = {"settings": [asdict(setting) for setting in settings]}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / SWEEP_FILE, text.encode())


def read_plan(folder: Path) -> list[PlannedSetting]:
    """The planned settings, the unmerged pipeline first.

    Raises:
        ValueError: `sweep.json` is damaged, or names a folder outside this one.
    """
    path = folder / SWEEP_FILE
    document = read_json(path)
    try:
        settings = [PlannedSetting(**setting) for setting in document["settings"]]
        for setting in settings:
            path_inside(folder / RUNS, setting.folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Run the sweep again to write a new one."
        ) from error
    return settings


def count_tabulated(folder: Path) -> int:
    """Number of settings in the tables; 0 if a table is missing or damaged."""
    try:
        rows = read_json(folder / "table.json")["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    is_whole = isinstance(rows, list) and all((folder / name).is_file() for name in TABLES)
    return len(rows) if is_whole else 0


def write_results(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the results, and remove those of before that no longer belong to them."""
    for name in RESULT_FILES:
        if name in files:
            write_atomically(folder / name, files[name])
        else:
            (folder / name).unlink(missing_ok=True)
