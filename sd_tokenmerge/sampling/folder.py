"""A run folder: whether it may be used, what is in it, and what is still to be done."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sd_tokenmerge.files import temporary_path
from sd_tokenmerge.sampling.description import (
    RUN_FILE,
    Description,
    content_differences,
    option_differences,
    read_description,
    write_description,
)
from sd_tokenmerge.sampling.manifest import (
    ImageRecord,
    intact_records,
    load_manifest,
    manifest_files,
)
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob

_OWN_FILES = re.compile(r"\.?(\d+_\d+\.png|manifest.*\.jsonl)(\.tmp)?")
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Survey:
    """What is in a run folder, compared with what should be.

    Attributes:
        intact: records of images that are there as recorded, by file name.
        missing: these images are not there, and were never recorded: not made yet.
        lost: these images are recorded, but not there.
        changed: these images are not what their record says.
        unrecorded: these images are there, but no record vouches for them.
        foreign: pictures that are no part of the run.
        damaged_lines: manifest lines that are no record, or were cut off, as "file, line n".
    """

    intact: dict[str, ImageRecord]
    missing: list[str]
    lost: list[str]
    changed: list[str]
    unrecorded: list[str]
    foreign: list[str]
    damaged_lines: list[str]

    def findings(self) -> list[str]:
        """What is wrong, a line each; that an image was not made yet is no finding."""
        kinds = {
            "recorded image that is not there": self.lost,
            "image with another content than recorded": self.changed,
            "image without a record": self.unrecorded,
            "manifest line that is no record": self.damaged_lines,
            "picture that is no part of the run": self.foreign,
        }
        return [
            f"{len(names)} x {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in kinds.items()
            if names
        ]


def check_folder(folder: Path, options: ResolvedOptions, overwrite: bool) -> None:
    """Refuse a folder that cannot be used, before anything expensive; writes nothing.

    Raises:
        ValueError: it holds another run (and not `overwrite`) or something else than a run.
        OSError: it cannot be written to.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(existing))
    if not folder.exists():
        return
    if not (folder / RUN_FILE).exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise ValueError(
                f"`out` must be a new or empty folder, or hold a run ({RUN_FILE}), got "
                f"{str(folder)!r} with {others[0]!r} in it."
            )
    elif not overwrite and (description := read_description(folder)) is not None:
        _refuse_differences(folder, option_differences(description, options))


def settle_description(
    folder: Path, new: Description, options: ResolvedOptions, overwrite: bool
) -> Description | None:
    """Write `run.json`, or check it against the one that is there; the folder must be locked.

    Returns:
        The description that was there and stays, None if the new one was written.

    Raises:
        ValueError: the folder holds a run with other options or content, and not `overwrite`.
    """
    if not overwrite and (old := read_description(folder)) is not None:
        differences = option_differences(old, options) + content_differences(old, new)
        _refuse_differences(folder, differences)
        return old
    if (folder / RUN_FILE).exists():
        for path in folder.iterdir():
            if _OWN_FILES.fullmatch(path.name):
                path.unlink()
    write_description(folder, new)
    return None


def survey_folder(
    folder: Path,
    files: Collection[str],
    *,
    all_files: Collection[str] | None = None,
    own_parts: Collection[Path] | None = None,
    is_right: Callable[[ImageRecord], bool] = lambda record: True,
) -> Survey:
    """Read every recorded image and compare it with its record; writes nothing.

    Args:
        folder: the run folder.
        files: the images that matter: a shard's, or all.
        all_files: names of all images of the run, default `files`; other pictures are foreign, and
            a Fréchet distance would count them.
        own_parts: manifests that nobody writes now, in which an unfinished line is damage;
            default: all.
        is_right: whether a record is of this run.
    """
    parts = manifest_files(folder)
    wanted = set(files)
    known = wanted if all_files is None else set(all_files)
    own = load_manifest(parts if own_parts is None else own_parts)
    records = [
        record
        for record in load_manifest(parts).records
        if record.file in wanted and is_right(record)
    ]
    intact = intact_records(folder, records)
    recorded = {record.file for record in records}
    pictures = {
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in _PICTURES and not path.name.startswith(".")
    }
    rest = [name for name in files if name not in intact]
    return Survey(
        intact=intact,
        missing=[name for name in rest if name not in pictures and name not in recorded],
        lost=[name for name in rest if name not in pictures and name in recorded],
        changed=[name for name in rest if name in pictures and name in recorded],
        unrecorded=[name for name in rest if name in pictures and name not in recorded],
        foreign=sorted(pictures - known),
        damaged_lines=own.damaged_lines + own.unfinished_lines,
    )


def remove_temporaries(folder: Path, jobs: Iterable[ImageJob]) -> None:
    """Remove what a killed process left behind of these images."""
    for job in jobs:
        temporary_path(folder / job.file).unlink(missing_ok=True)


def _refuse_differences(folder: Path, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"`out` must be a new folder or hold a run with the same options, got {str(folder)!r}, "
            f"which differs (there -> now): {'; '.join(differences)}. Choose another folder, or "
            f"replace the old run with `overwrite`."
        )
