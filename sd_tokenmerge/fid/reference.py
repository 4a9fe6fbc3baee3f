"""ATC's reference set: the first five validation images, by name, of each of the 1,000 classes.

Copied as they are: original size and aspect ratio, original JPEG bytes, in one flat folder. The
list of the 5,000 images comes with this package. Images are found by their file names, so any
layout of the validation set works, without labels.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sd_tokenmerge.fid.images import ImageError, read_image
from sd_tokenmerge.files import file_sha256, parse_json, write_atomically
from sd_tokenmerge.machine import usable_cores
from sd_tokenmerge.sampling.imagenet import CLASSES, val_first_five

MANIFEST = "manifest.jsonl"
_VALIDATION_NAME = re.compile(r"(ILSVRC2012_val_\d{8})(?:_n\d{8})?\.jpe?g", re.IGNORECASE)


class ReferenceSetError(ValueError):
    """The source is not the complete validation set; the message names the reason."""


@dataclass(frozen=True)
class ReferenceImage:
    """One line of the manifest.

    Attributes:
        file: name in the reference folder.
        class_index: 0 to 999.
        synset: WordNet id of the class.
        sha256: of the file.
    """

    file: str
    class_index: int
    synset: str
    sha256: str


@dataclass(frozen=True)
class ReferenceSet:
    """A complete reference set.

    Attributes:
        folder: holds the images and the manifest.
        images: in the order of classes and names.
        reused: whether the folder held the set already.
    """

    folder: Path
    images: tuple[ReferenceImage, ...]
    reused: bool = False


def make_reference(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceSet:
    """Copy the 5,000 reference images and write their manifest.

    The folder appears under its name only when it is complete. If it already holds the complete
    set, the set is verified and left unchanged.

    Args:
        source: the validation set; searched recursively.
        out: new folder.
        link: make symbolic links instead of copies.
        progress: called with (images done, images in all).

    Raises:
        ReferenceSetError: an image is missing, ambiguous or cannot be decoded.
        ValueError: `out` exists and is not the complete reference set.
        OSError: a file cannot be copied.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return ReferenceSet(out, verify_reference(out), reused=True)
    paths = find_reference_images(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.partial-"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*"):  # of a killed process
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=prefix))

    def add(expected: tuple[str, int]) -> ReferenceImage:
        name, class_index = expected
        target = partial / name
        if link:
            target.symlink_to(paths[name].resolve())
        else:
            shutil.copyfile(paths[name], target)
        try:
            read_image(target)
        except ImageError as error:
            raise ReferenceSetError(f"{str(paths[name])!r} is damaged: {error}") from error
        return ReferenceImage(name, class_index, CLASSES[class_index].synset, file_sha256(target))

    try:
        images = []
        with ThreadPoolExecutor(min(usable_cores(), 16)) as pool:
            for image in pool.map(add, _expected_images()):
                images.append(image)
                if progress is not None:
                    progress(len(images), len(paths))
        lines = [json.dumps(asdict(image)) + "\n" for image in images]
        write_atomically(partial / MANIFEST, "".join(lines).encode())
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ReferenceSet(out, tuple(images))


def find_reference_images(source: Path) -> dict[str, Path]:
    """The 5,000 reference images in a folder of any layout, by `ILSVRC2012_val_00000293.JPEG`.

    Args:
        source: searched recursively. File names may end in a synset, as on the Hugging Face hub.

    Raises:
        ReferenceSetError: `source` is not a folder, or an image is missing or found twice.
    """
    if not source.is_dir():
        raise ReferenceSetError(f"`source` must be an existing folder, got {str(source)!r}.")
    expected = {name for name, _ in _expected_images()}
    found: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        match = _VALIDATION_NAME.fullmatch(path.name)
        name = f"{match[1]}.JPEG" if match else ""
        if name not in expected or not path.is_file():
            continue
        if name in found:
            raise ReferenceSetError(
                f"{name} must be in `source` once, found {str(found[name])!r} and {str(path)!r}."
            )
        found[name] = path
    if missing := sorted(expected - found.keys()):
        raise ReferenceSetError(
            f"`source` must hold the whole ImageNet validation set, but {len(missing):,} of the "
            f"{len(expected):,} reference images are not in {str(source)!r}; the first is "
            f"{missing[0]}."
        )
    return found


def verify_reference(folder: str | os.PathLike[str]) -> tuple[ReferenceImage, ...]:
    """Check that a folder holds exactly the reference set, byte for byte as in its manifest.

    Returns:
        The manifest.

    Raises:
        ValueError: a file is missing, changed or unexpected, or the manifest is damaged.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"`out` must be a new folder or a reference set, but {str(folder)!r} has no {MANIFEST}."
        )
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
        images = tuple(ReferenceImage(**parse_json(line, str(manifest))) for line in lines)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(manifest)!r} is not a manifest of a reference set.") from error
    if [(image.file, image.class_index) for image in images] != _expected_images():
        raise ValueError(f"{str(manifest)!r} does not list the 5,000 reference images.")
    listed = {image.file for image in images}
    if odd := sorted(listed ^ ({entry.name for entry in folder.iterdir()} - {MANIFEST})):
        raise ValueError(
            f"{str(folder)!r} must hold the 5,000 reference images and nothing else; "
            f"{len(odd)} files are missing or unexpected, the first being {odd[0]!r}."
        )
    for image in images:
        if file_sha256(folder / image.file) != image.sha256:
            raise ValueError(
                f"{str(folder / image.file)!r} does not match its hash in the manifest."
            )
    return images


def _expected_images() -> list[tuple[str, int]]:
    """File name and class index of every image, in the order of the manifest."""
    return [
        (f"ILSVRC2012_val_{number:08d}.JPEG", class_index)
        for class_index, numbers in enumerate(val_first_five())
        for number in numbers
    ]
