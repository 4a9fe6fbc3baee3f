"""Checks of a run folder: whether it may be used, and which of its images are intact."""

from __future__ import annotations

import errno
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
    """The content of a run folder, compared with its plan and manifests.

    Attributes:
        intact: records of the intact images, by file name.
        missing: images without file or record: not generated yet.
        lost: images that have a record but no file.
        changed: images that differ from their record.
        unrecorded: images that have a file but no record.
        foreign: pictures that are not part of the run.
        damaged_lines: manifest lines that are not records or were cut off, as "file, line n".
    """

    intact: dict[str, ImageRecord]
    missing: list[str]
    lost: list[str]
    changed: list[str]
    unrecorded: list[str]
    foreign: list[str]
    damaged_lines: list[str]

    def findings(self) -> list[str]:
        """One line per kind of damage; images that were not generated yet are no damage."""
        kinds = {
            "recorded image that is not there": self.lost,
            "image with another content than recorded": self.changed,
            "image without a record": self.unrecorded,
            "manifest line that is not a record": self.damaged_lines,
            "picture that is not part of the run": self.foreign,
        }
        return [
            f"{len(names)} x {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in kinds.items()
            if names
        ]


def check_folder(folder: Path, options: ResolvedOptions, overwrite: bool) -> None:
    """Refuse a folder that cannot be used, before anything expensive; writes nothing.

    Raises:
        ValueError: it holds another run (without `overwrite`) or something other than a run.
        OSError: it cannot be written to.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Permission denied", str(existing))
    if not folder.exists():
        return
    if (folder / RUN_FILE).exists():
        if not overwrite and (description := read_description(folder)) is not None:
            _refuse_differences(folder, options, option_differences(description, options))
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in names if not _OWN_FILES.fullmatch(name)]
    if manifest_files(folder) and not others:
        if not overwrite:
            raise ValueError(
                f"`out` must hold a {RUN_FILE} beside its images, got {str(folder)!r} without one. "
                f"Restore it from a copy, or generate all images anew with `overwrite`."
            )
    elif names:
        raise ValueError(
            f"`out` must be a new or empty folder, or hold a run ({RUN_FILE}), got "
            f"{str(folder)!r} with {(others or names)[0]!r} in it."
        )


def settle_description(
    folder: Path, new: Description, options: ResolvedOptions, overwrite: bool
) -> Description | None:
    """Write `run.json`, or compare it with the existing one; the folder must be locked.

    Returns:
        The existing description, which stays; None if the new one was written.

    Raises:
        ValueError: the folder holds a run with other options or content (without `overwrite`).
    """
    if not overwrite and (old := read_description(folder)) is not None:
        differences = option_differences(old, options) + content_differences(old, new)
        _refuse_differences(folder, options, differences)
        if not differences:
            return old
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
    write_description(folder, new)
    return None


def survey_folder(
    folder: Path,
    files: Collection[str],
    *,
    hash_all: bool,
    all_files: Collection[str] | None = None,
    own_parts: Collection[Path] | None = None,
    is_right: Callable[[ImageRecord], bool] = lambda record: True,
) -> Survey:
    """Compare the images of a folder with their records; writes nothing.

    Args:
        folder: the run folder.
        files: the expected images: a shard's, or all.
        hash_all: hash every image; see `intact_records`.
        all_files: names of all images of the run; default: `files`. Other pictures are foreign; a
            Fréchet distance would count them.
        own_parts: manifests that no process is writing, so that an unfinished line is damage;
            default: all.
        is_right: whether a record belongs to this run.
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
    intact = intact_records(folder, records, hash_all=hash_all)
    recorded = {record.file for record in records}
    pictures = {path.name for path in folder.iterdir() if _is_picture(path)}
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


def prepare_files(folder: Path, jobs: Iterable[ImageJob]) -> None:
    """Remove the temporary files of killed processes, and refuse folders in place of images.

    Raises:
        IsADirectoryError: a folder has the name of an image.
    """
    for job in jobs:
        temporary_path(folder / job.file).unlink(missing_ok=True)
        if (folder / job.file).is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(folder / job.file))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _PICTURES and not path.name.startswith(".")


def _refuse_differences(folder: Path, options: ResolvedOptions, differences: list[str]) -> None:
    """Refuse another run, unless it has no images: it failed at once, and may be replaced."""
    if not differences:
        return
    has_images = any(_is_picture(path) for path in folder.iterdir())
    has_records = any(path.stat().st_size for path in manifest_files(folder))
    if has_images or has_records or options.shard is not None:  # other shards may be running
        raise ValueError(
            f"`out` must be a new folder or hold a run with the same options, got {str(folder)!r}, "
            f"which differs (there -> now): {'; '.join(differences)}. Choose another folder, or "
            f"replace the old run with `overwrite`."
        )
