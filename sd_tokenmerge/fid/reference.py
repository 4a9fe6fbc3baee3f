"""ATC's reference set: the first five validation images, by name, of each of the 1,000 classes.

Copied as they are: original size and aspect ratio, original JPEG bytes, in one flat folder. The
set is known, so a source with missing images or wrong labels is an error and never a slightly
different set.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sd_tokenmerge.fid.imagenet_val import (
    ReferenceSetError,
    ValidationImages,
    find_validation_images,
)
from sd_tokenmerge.files import file_sha256
from sd_tokenmerge.sampling.imagenet import CLASSES, val_first_five

MANIFEST = "manifest.jsonl"
PER_CLASS = 5


@dataclass(frozen=True)
class ReferenceImage:
    """One line of the manifest.

    Attributes:
        file: name in the reference folder.
        class_index: 0 to 999.
        synset: of the class.
        sha256: of the file.
    """

    file: str
    class_index: int
    synset: str
    sha256: str


@dataclass(frozen=True)
class ReferenceSet:
    """What `make_reference` made.

    Attributes:
        folder: where the images and the manifest are.
        layout: how the source told its classes (see `imagenet_val.py`).
        images: in the order of classes and numbers.
        reused: whether the folder held the set already.
    """

    folder: Path
    layout: str
    images: tuple[ReferenceImage, ...]
    reused: bool = False


def make_reference(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceSet:
    """Copy the 5,000 reference images and write their manifest.

    The folder appears under its name only when it is complete. One that holds the complete set
    already is verified and left alone.

    Args:
        source: the validation set, in any layout of `imagenet_val.py`.
        out: new folder.
        labels: label file for a flat source; default: looked for in it and beside it.
        link: make symbolic links instead of copies.
        progress: called with (images done, images in all).

    Raises:
        ReferenceSetError: the source is not the complete validation set, or its labels give other
            images than the known ones.
        ValueError: `out` exists and is something else.
        OSError: a file cannot be copied.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return ReferenceSet(out, "known-list", verify_reference(out), reused=True)
    found = find_validation_images(source, None if labels is None else Path(labels))
    chosen = choose(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        images = []
        for class_index, numbers in enumerate(chosen):
            for number in numbers:
                name = _file_name(number)
                path = found.paths[number]
                if link:
                    (partial / name).symlink_to(path.resolve())
                else:
                    shutil.copyfile(path, partial / name)
                digest = file_sha256(partial / name)
                images.append(
                    ReferenceImage(name, class_index, CLASSES[class_index].synset, digest)
                )
                if progress is not None:
                    progress(len(images), len(CLASSES) * PER_CLASS)
        _write_manifest(partial, images)
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ReferenceSet(out, found.layout, tuple(images))


def choose(found: ValidationImages) -> tuple[tuple[int, ...], ...]:
    """Numbers of the five images of each class, checked against the known list.

    Raises:
        ReferenceSetError: an image is missing, or the labels give another one.
    """
    known = val_first_five()
    missing = [number for numbers in known for number in numbers if number not in found.paths]
    if missing:
        raise ReferenceSetError(
            f"{len(missing)} of the {len(known) * PER_CLASS:,} reference images are missing, the "
            f"first being {_file_name(missing[0])}: the source must be the whole validation set."
        )
    if found.classes is None:
        return known
    members: dict[int, list[int]] = {entry.index: [] for entry in CLASSES}
    for number in sorted(found.paths):  # names sort as their eight-digit numbers do
        if number not in found.classes:
            raise ReferenceSetError(f"{_file_name(number)} has no label.")
        members[found.classes[number]].append(number)
    chosen = tuple(tuple(members[entry.index][:PER_CLASS]) for entry in CLASSES)
    wrong = [entry for entry in CLASSES if chosen[entry.index] != known[entry.index]]
    if wrong:
        first = wrong[0]
        raise ReferenceSetError(
            f"The labels ({found.layout}) give other images than the known ones for {len(wrong)} "
            f"of {len(CLASSES):,} classes; the first is {first.synset} ({first.short_name}) with "
            f"{list(chosen[first.index])} instead of {list(known[first.index])}."
        )
    return known


def verify_reference(folder: str | os.PathLike[str]) -> tuple[ReferenceImage, ...]:
    """Check that a folder holds exactly the reference set, byte for byte as in its manifest.

    Returns:
        The manifest.

    Raises:
        ValueError: it holds something else, or a file was changed.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"`out` must be a new folder or a reference set, but {str(folder)!r} has no {MANIFEST}."
        )
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
        images = tuple(ReferenceImage(**json.loads(line)) for line in lines)
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(manifest)!r} is not a manifest of a reference set.") from error
    expected = [
        (_file_name(number), index)
        for index, numbers in enumerate(val_first_five())
        for number in numbers
    ]
    if [(image.file, image.class_index) for image in images] != expected:
        raise ValueError(f"{str(manifest)!r} does not list the 5,000 reference images.")
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    listed = {image.file for image in images}
    if present != listed:
        odd = sorted(present ^ listed)
        raise ValueError(
            f"{str(folder)!r} must hold the 5,000 reference images and nothing else; "
            f"{len(odd)} files are missing or too many, the first being {odd[0]!r}."
        )
    for image in images:
        if file_sha256(folder / image.file) != image.sha256:
            raise ValueError(f"{str(folder / image.file)!r} is not what the manifest says.")
    return images


def _file_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def _write_manifest(folder: Path, images: list[ReferenceImage]) -> None:
    lines = [json.dumps(asdict(image)) for image in images]
    (folder / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")
