"""Notices a patched denoiser that is called from two threads at a time."""

from __future__ import annotations

from threading import get_ident

import torch


class OneThread:
    """The thread that runs a part of the denoiser; no other may run the part meanwhile.

    The later thread takes over, and the earlier one fails at its next `require`. Nothing waits and
    nothing has to be released, so a call that was interrupted never blocks the next one. Compiled
    graphs keep no state between their parts, so nothing is checked there.
    """

    _thread: int | None = None

    def enter(self) -> None:
        """Note that the current thread begins to run the part."""
        self._thread = None if torch.compiler.is_compiling() else get_ident()

    @property
    def is_current(self) -> bool:
        """Whether no other thread has begun to run the part since the current one did."""
        return torch.compiler.is_compiling() or self._thread in (None, get_ident())

    def require(self) -> None:
        """Refuse to go on after another thread has taken over.

        Raises:
            RuntimeError: another thread has begun to run the part.
        """
        if not self.is_current:
            raise RuntimeError(
                "a patched denoiser must not be called from two threads at a time: give each "
                "thread a copy of the pipeline, or call it under a lock."
            )
