"""Find and read the images of a set; every unusual file has a defined outcome.

| file | outcome |
|---|---|
| corrupt, truncated, empty, not an image | `ImageError` that names the file |
| animation (more than one frame) | `ImageError`; a multi-picture JPEG (MPO) counts as its first |
| 32-bit integer or floating-point pixels | `ImageError`: their range is unknown |
| greyscale, palette, 1-bit, CMYK | Pillow's `convert("RGB")`, as in clean-fid |
| alpha channel | dropped by `convert("RGB")`, keeping the colours, as in clean-fid |
| 16 bits per channel | the high byte (Pillow alone would clip 16-bit greyscale to white) |
| EXIF rotation | ignored, as in clean-fid: pixels are used as stored |
| hidden (name begins with a dot), other suffixes, pipes, devices | not part of the set |
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # some others start programs
_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_16_BIT_AS_INTEGER = ("PNG", "PPM")  # Pillow opens 16-bit grey as "I": PGM, and PNG before 11.0
DECODING_ERRORS = (  # what Pillow's decoders raise on damaged files
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """An image file that cannot be used; the message names it."""


def find_images(folder: str | os.PathLike[str], *, name: str = "folder") -> list[Path]:
    """List the images of a folder and its sub-folders.

    Args:
        folder: searched recursively, following links to folders (each real folder once).
        name: what messages call the folder, such as an argument's name.

    Returns:
        Paths sorted by their POSIX path relative to `folder`: the order of features and of every
        pairing. Suffixes are compared without case.

    Raises:
        ValueError: `folder` does not exist, is not a folder, cannot be read, or holds no image.
    """
    root = Path(folder)
    if not root.exists():
        raise ValueError(f"`{name}` must be an existing folder, got {str(root)!r}.")
    if not root.is_dir():
        raise ValueError(f"`{name}` must be a folder, got the file {str(root)!r}.")
    paths = [path for path in _walk(root, set()) if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"`{name}` must hold images ({', '.join(sorted(SUFFIXES))}), "
            f"found none in {str(root)!r}."
        )
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Regular files that are not hidden."""
    real = folder.resolve()
    if real in seen:  # a link back to a folder that was already visited
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"The folder {str(folder)!r} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        elif entry.is_file() or not entry.exists():  # a dangling link is an error when read
            yield entry


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode one image completely and convert it to 8-bit RGB as the table above says.

    Raises:
        ImageError: the file cannot be read, is not one complete still image, or has pixels of
            unknown range.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise ImageError(
                    f"{os.fspath(path)!r} holds {frames} frames; a set must consist of stills."
                )
            image.load()
            return _to_rgb(image, path)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        reason = "it is empty" if os.path.getsize(path) == 0 else "it is not an image"
        raise ImageError(f"{os.fspath(path)!r} cannot be read: {reason}.") from error
    except DECODING_ERRORS as error:
        raise ImageError(f"{os.fspath(path)!r} cannot be read: {error}.") from error


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    is_16_bit = image.mode in _16_BIT_MODES
    if image.mode == "I" and image.format in _16_BIT_AS_INTEGER:
        is_16_bit = True
    elif image.mode in ("I", "F"):
        raise ImageError(
            f"{os.fspath(path)!r} has pixels of mode {image.mode!r}, whose range is not known; "
            "convert it to 8 bits first."
        )
    if is_16_bit:
        high_bytes = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    image.info.pop("transparency", None)  # Pillow would warn that it is lost
    return image.convert("RGB")
