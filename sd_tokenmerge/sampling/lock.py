"""Keep two processes from generating the same images of one folder.

Locks are the operating system's: they end with their process, however it ends. A whole run holds
`.lock`; a shard holds `.lock-<i>-of-<n>`, and `.lock` only during its set-up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PROBE_TIMEOUT_S = 1.0
"""`is_locked` shares a lock for an instant; a run that starts in that instant must not fail."""

_SET_UP_TIMEOUT_S = 20.0


class FolderBusyError(ValueError):
    """Another process is generating the same images."""


@contextmanager
def lock_folder(folder: Path, shard: int = 0, shards: int = 1) -> Iterator[Callable[[], None]]:
    """Hold a folder, or one shard of it, while generating.

    Yields:
        A function to call after the set-up, to let other shards set up.

    Raises:
        FolderBusyError: another process holds it, or holds a shard of another division.
    """
    is_shard, division = shards > 1, f"-of-{shards}"
    with ExitStack() as own, ExitStack() as gate:
        timeout = _SET_UP_TIMEOUT_S if is_shard else _PROBE_TIMEOUT_S
        gate.enter_context(_taken(folder / ".lock", timeout))
        for path in folder.glob(".lock-*-of-*"):
            if not (is_shard and path.name.endswith(division)):
                with _taken(path, _PROBE_TIMEOUT_S):
                    pass
        if is_shard:
            own.enter_context(_taken(folder / f".lock-{shard + 1}{division}", _PROBE_TIMEOUT_S))
        yield gate.close if is_shard else lambda: None


@contextmanager
def _taken(path: Path, timeout_s: float) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        raise FolderBusyError(
            f"`out` must not be in use, got {str(path.parent)!r}: another process is generating "
            f"the same images there. Wait for it, or divide the work with `shard`."
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether any process is generating into the folder; needs no permission to write."""
    return any(_is_held(path) for path in [folder / ".lock", *folder.glob(".lock-*-of-*")])


def _is_held(path: Path) -> bool:
    if os.name != "posix":
        try:
            with _taken(path, 0):
                return False
        except FolderBusyError:
            return True
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing releases it
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
