"""Read and write the project's own files safely. Imports no torch.

Writing is all or nothing: a reader, or a crash, sees the old file or the new one. Reading trusts
nothing: a stored file may have been damaged or edited by hand, so content that is not valid JSON,
or a name that leads out of its folder, is one `ValueError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO
from uuid import uuid4

_CHUNK_BYTES = 1 << 20
_LEFTOVER_AGE_S = 3600.0


def temporary_path(path: Path) -> Path:
    """The hidden file beside `path` that `write_atomically` writes before renaming it."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step; only one process at a time may write a given path.

    Raises:
        OSError: writing failed; `path` is unchanged and the temporary file removed.
    """
    with _renamed_when_complete(path, temporary_path(path)) as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an exception.

    Several processes may write the same path; the last to finish wins.

    Raises:
        OSError: writing failed; `path` is unchanged and the temporary file removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with _renamed_when_complete(path, temporary) as file:
        yield file


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Those are the files of `open_atomically` that nobody has written to for an hour.

    Raises:
        OSError: a file cannot be removed.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink()


@contextmanager
def _renamed_when_complete(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write and flush it to the disk.

    Raises:
        OSError: writing failed; part of the line may have been written.
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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read or is not a regular file.
    """
    digest = hashlib.sha256()
    with _open_regular_file(Path(path)) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_regular_file(path: str | os.PathLike[str], max_bytes: int = -1) -> bytes:
    """The bytes of a file, at most the first `max_bytes` unless that is -1.

    Raises:
        OSError: the file cannot be read, or is a folder, a pipe or a device.
    """
    with _open_regular_file(Path(path)) as file:
        return file.read(max_bytes)


def read_json(
    path: str | os.PathLike[str], *, max_bytes: int = 64 << 20, minus_infinity: bool = False
) -> Any:
    """Read a JSON file that may have been damaged or edited by hand.

    Args:
        path: UTF-8 text.
        max_bytes: size above which the file is refused.
        minus_infinity: see `parse_json`.

    Raises:
        ValueError: not valid JSON (see `parse_json`) or too large; the message names the file.
        OSError: the file cannot be read or is not a regular file.
    """
    data = read_regular_file(path, max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{os.fspath(path)} must be at most {max_bytes:,} bytes, but is larger.")
    return parse_json(data, os.fspath(path), minus_infinity=minus_infinity)


def read_json_object(
    path: str | os.PathLike[str], *, minus_infinity: bool = False
) -> dict[str, Any]:
    """Read a JSON file that must hold an object; arguments and errors are those of `read_json`.

    Raises:
        ValueError: also if it holds another value.
    """
    content = read_json(path, minus_infinity=minus_infinity)
    if not isinstance(content, dict):
        raise ValueError(
            f"{os.fspath(path)} must hold a JSON object, got {type(content).__name__}."
        )
    return content


def parse_json(text: str | bytes, source: str, *, minus_infinity: bool = False) -> Any:
    """Parse JSON as RFC 8259 defines it; every failure is one `ValueError`.

    Unlike `json.loads`, refuses NaN, infinities (also `1e999`) and lone surrogates, which could not
    be written back, and reports deep nesting and integers of thousands of digits as bad input.

    Args:
        text: the document; bytes must be UTF-8.
        source: what to call it in the message, such as its file.
        minus_infinity: whether to accept `-Infinity`, which diffusers writes for schedulers.

    Raises:
        ValueError: the text is not such a document; the message begins with `source`.
    """

    def parse_constant(name: str) -> float:
        if minus_infinity and name == "-Infinity":
            return float(name)
        raise ValueError(f"{name} is not a JSON number")

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_constant=parse_constant, parse_float=_finite_float)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}.") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{source} is not valid JSON: it has a lone surrogate.") from error
    except RecursionError as error:
        raise ValueError(f"{source} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}.") from error
    return value


def path_inside(folder: Path, name: str) -> Path:
    """`folder / name` for a name read from a stored file, which must not lead out of the folder.

    Args:
        folder: must exist.
        name: relative path in POSIX style; the file need not exist.

    Raises:
        ValueError: `name` is empty, absolute or contains `..`, or a symbolic link on the way leads
            out of the folder.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    is_plain = posix.parts and "\0" not in name and ".." not in windows.parts
    if not is_plain or posix.is_absolute() or windows.drive or windows.root:
        raise ValueError(f"{name!r} must be a relative path inside {str(folder)!r}.")
    path = folder / posix
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        is_inside = False
    if not is_inside:
        raise ValueError(f"{name!r} leads out of {str(folder)!r} through a symbolic link.")
    return path


def describe_error(error: Exception) -> str:
    """An exception's message on one line, with the file's name if the system left it out."""
    if isinstance(error, OSError) and error.strerror:
        name = f" `{error.filename}`" if error.filename is not None else ""
        return f"{error.strerror}:{name}" if name else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _open_regular_file(path: Path) -> BinaryIO:
    """Refuse pipes and devices, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.open("rb")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
