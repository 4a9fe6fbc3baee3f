"""Ctrl-C and SIGTERM end a run after the current batch, not in the middle of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_S = 1.0  # launchers forward a Ctrl-C that the terminal has already sent


class StopRequest:
    """Whether the user or the system asked this process to stop.

    Attributes:
        signal_number: the first signal that arrived; 0 if none did.
    """

    def __init__(self, on_first: Callable[[], None]):
        self.signal_number = 0
        self._on_first = on_first
        self._time = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C stops at once."""
        if not self.signal_number:
            self.signal_number = number
            self._time = time.monotonic()
            self._on_first()
        elif number == signal.SIGINT and time.monotonic() - self._time > _REPEAT_S:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals(on_first: Callable[[], None]) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; only the main thread can catch signals."""
    request = StopRequest(on_first)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
