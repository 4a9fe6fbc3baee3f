"""Files that are there as a whole or not at all, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where `write_atomically` writes before it renames; hidden, in the same folder."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees its old state or its new one, nothing else.

    Written to a temporary file, flushed to the disk, renamed. Only one process may write a path.

    Raises:
        OSError: it cannot be written; the path is as it was, and the temporary file is gone.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line in one write and flush it to the disk.

    Raises:
        OSError: it cannot be written; part of the line may have been.
    """
    try:
        with path.open("ab", buffering=0) as file:
            data = line.encode() + b"\n"
            written = file.write(data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes could be written")
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
