"""Keep two processes from working on the same images of one folder by mistake.

Locks are the operating system's: they end with their process, however it ends. A whole run holds
`.lock`; a shard holds `.lock-<i>-of-<n>`, and `.lock` only while it sets up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_SET_UP_TIMEOUT_S = 20.0


class FolderBusyError(ValueError):
    """Another process is working on the same images."""


class FolderLock:
    """The right to generate one shard of a folder; see `lock_folder`."""

    def __init__(self, folder: Path, shard: int, shards: int):
        self._stack = ExitStack()
        self._gate = ExitStack()
        with ExitStack() as undo:
            gate = FileLock(folder / ".lock")
            self._take(gate, folder, timeout=_SET_UP_TIMEOUT_S if shards > 1 else 0)
            undo.callback(gate.release)
            division = f"-of-{shards}" if shards > 1 else None
            for path in folder.glob(".lock-*-of-*"):
                if division is None or not path.name.endswith(division):
                    probe = FileLock(path)
                    self._take(probe, folder, timeout=0)
                    probe.release()
            if division is not None:
                own = FileLock(folder / f".lock-{shard + 1}{division}")
                self._take(own, folder, timeout=0)
                self._stack.callback(own.release)
            self._gate.callback(gate.release)
            undo.pop_all()
        self._is_shard = division is not None

    def end_set_up(self) -> None:
        """Let other shards in; does nothing for a whole run."""
        if self._is_shard:
            self._gate.close()

    def release(self) -> None:
        """Give the folder back."""
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
    """Whether any process is generating into the folder."""
    for path in [folder / ".lock", *folder.glob(".lock-*-of-*")]:
        if not path.exists():
            continue
        probe = FileLock(path)
        try:
            probe.acquire(timeout=0)
        except Timeout:
            return True
        probe.release()
    return False
