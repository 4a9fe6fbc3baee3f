"""Keep two processes from generating the same images of one folder.

Locks are the operating system's: they end with their process, however it ends. A whole run holds
`.lock`; a shard holds `.lock-<i>-of-<n>`, and `.lock` only during its set-up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PROBE_TIMEOUT_S = 1.0
"""`is_locked` shares a lock for an instant; a run that starts in that instant must not fail."""

_SET_UP_TIMEOUT_S = 20.0


class FolderBusyError(ValueError):
    """Another process is generating the same images."""


class FolderLock:
    """The right to generate one shard of a folder; see `lock_folder`."""

    def __init__(self, folder: Path, shard: int, shards: int):
        self._stack = ExitStack()
        self._gate = ExitStack()
        self._is_shard = shards > 1
        with ExitStack() as undo:
            gate = FileLock(folder / ".lock")
            self._take(gate, folder, _SET_UP_TIMEOUT_S if self._is_shard else _PROBE_TIMEOUT_S)
            undo.callback(gate.release)
            division = f"-of-{shards}"
            for path in folder.glob(".lock-*-of-*"):
                if not (self._is_shard and path.name.endswith(division)):
                    other = FileLock(path)
                    self._take(other, folder, _PROBE_TIMEOUT_S)
                    other.release()
            if self._is_shard:
                own = FileLock(folder / f".lock-{shard + 1}{division}")
                self._take(own, folder, _PROBE_TIMEOUT_S)
                self._stack.callback(own.release)
            self._gate.callback(gate.release)
            undo.pop_all()

    def end_set_up(self) -> None:
        """Let other shards set up; does nothing for a whole run."""
        if self._is_shard:
            self._gate.close()

    def release(self) -> None:
        """Give up the folder."""
        self._gate.close()
        self._stack.close()

    @staticmethod
    def _take(lock: FileLock, folder: Path, timeout: float) -> None:
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise FolderBusyError(
                f"`out` must not be in use, got {str(folder)!r}: another process is generating "
                f"the same images there. Wait for it, or divide the work with `shard`."
            ) from None


@contextmanager
def lock_folder(folder: Path, shard: int = 0, shards: int = 1) -> Iterator[FolderLock]:
    """Hold a folder, or one shard of it, while generating.

    Raises:
        FolderBusyError: another process holds it, or holds a shard of another division.
    """
    lock = FolderLock(folder, shard, shards)
    try:
        yield lock
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether any process is generating into the folder; needs no permission to write."""
    return any(_is_held(path) for path in [folder / ".lock", *folder.glob(".lock-*-of-*")])


def _is_held(path: Path) -> bool:
    if os.name != "posix":
        probe = FileLock(path)
        try:
            probe.acquire(timeout=0)
        except Timeout:
            return True
        probe.release()
        return False
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
