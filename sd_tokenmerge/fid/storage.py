"""Read and write `.npz` files of features and statistics; nothing in them is trusted.

A file may come from another program, or be damaged. Types, shapes and sizes are read from the
headers and checked before anything is allocated, and nothing is unpickled.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from sd_tokenmerge.files import open_atomically

CACHE_VARIABLE = "SD_TOKENMERGE_CACHE"
MAX_ARRAY_BYTES = 16 << 30
"""Two million images of 2,048 features in float32."""
Array = npt.NDArray[np.generic]

_FLOATS = ("f2", "f4", "f8")
_MAX_COMPRESSION = 100


class StorageError(ValueError):
    """An `.npz` file that cannot be used; the message names it."""


def default_cache_folder() -> Path:
    """`$SD_TOKENMERGE_CACHE`, or `sd-tokenmerge` in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sd-tokenmerge"


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an `.npz` file atomically; creates the folder.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """Read arrays of floating point numbers or text from an `.npz` file.

    Args:
        path: the file.
        names: arrays to read if present; others are ignored.

    Returns:
        Arrays by name, in native byte order: float16, float32 or float64, or Unicode strings.

    Raises:
        StorageError: not a readable `.npz` file, or an array in it is damaged, of another type, or
            larger than `MAX_ARRAY_BYTES`.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"{str(path)!r} must be a regular file.")
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            present = set(archive.namelist())
            for name in names:
                if (member := f"{name}.npy") in present:
                    with archive.open(member) as stream:
                        arrays[name] = _read_array(stream, archive.getinfo(member), name)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"{str(path)!r} cannot be read as an .npz file: {reason}") from error
    return arrays


def _read_array(stream: IO[bytes], entry: zipfile.ZipInfo, name: str) -> Array:
    """Read one `.npy` file from an archive."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"`{name}` has the unknown format version {version}.")
    if dtype.kind != "U" and dtype.str[1:] not in _FLOATS:
        raise ValueError(f"`{name}` must be float16, float32, float64 or text, got {dtype}.")
    num_bytes = math.prod(shape) * dtype.itemsize
    if stream.tell() + num_bytes != entry.file_size or min(shape, default=0) < 0:
        raise ValueError(f"`{name}` does not have the size that its header says.")
    if num_bytes > min(MAX_ARRAY_BYTES, _MAX_COMPRESSION * (entry.compress_size + 1024)):
        raise ValueError(f"`{name}` is too large or too strongly compressed: {num_bytes:,} bytes.")
    data = stream.read(num_bytes)
    if stream.read(1) or len(data) < num_bytes:  # at its end, zipfile compares the checksum
        raise ValueError(f"`{name}` does not have the size that its header says.")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    if dtype.kind == "U":
        array.tolist()  # raises on invalid text
    return array.astype(dtype.newbyteorder("="), order="C")
