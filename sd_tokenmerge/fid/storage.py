"""Arrays on disk: written all or nothing, read without unpickling."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sd_tokenmerge.files import open_atomically

CACHE_VARIABLE = "SD_TOKENMERGE_CACHE"
Array = npt.NDArray[np.generic]


class StorageError(ValueError):
    """An `.npz` file that cannot be used; the message names it."""


def default_cache_folder() -> Path:
    """`$SD_TOKENMERGE_CACHE`, or `sd-tokenmerge` in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sd-tokenmerge"


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an `.npz` file that is either complete or not there.

    The file is written beside its place and renamed when it is on the disk, so neither a killed
    process nor a full disk leaves a broken one.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, wanted: set[str] | None = None) -> dict[str, Array]:
    """Read an `.npz` file; object arrays are refused, so nothing is unpickled.

    Args:
        path: the file.
        wanted: names to read where present (others may be large); None reads all.

    Raises:
        StorageError: not a readable `.npz` file, or an array in it is damaged or pickled.
    """
    try:
        with open(path, "rb") as file:  # numpy leaves a damaged file open that it opened itself
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise StorageError(f"{str(path)!r} must be an .npz file with named arrays.")
            names = [name for name in archive.files if wanted is None or name in wanted]
            return {name: archive[name] for name in names}
    except StorageError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"{str(path)!r} cannot be read as an .npz file: {reason}") from error
