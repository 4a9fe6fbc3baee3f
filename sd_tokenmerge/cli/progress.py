"""Progress on stderr: a bar in a terminal, otherwise a line every half minute."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sd_tokenmerge.processes import is_first_process

_LINE_EVERY_S = 30.0


class ConsoleProgress:
    """Implements `sampling.progress.Progress`.

    Args:
        label: text before the bar.
    """

    def __init__(self, label: str = "Generating"):
        self._label = label
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._total = 0
        self._before = 0
        self._generated = 0
        self._started = 0.0
        self._last_line = 0.0

    def start(self, total: int, done: int) -> None:
        """Show that generation begins."""
        self._total, self._before, self._generated = total, done, 0
        self._started = self._last_line = time.monotonic()
        if done:
            self.note(f"{self._label}: {done} of {total} images are already there.")
        if done < total and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                console=self._console,
                transient=True,
            )
            self._bar.add_task(self._label, total=total, completed=done, rate="")
            self._bar.start()

    def update(self, generated: int) -> None:
        """Show the images done, with the rate and the time left."""
        if generated == self._generated:
            return
        self._generated = generated
        rate = self._rate()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._before + generated, rate=rate)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"{self._label}: {self._before + generated}/{self._total} images, {rate}")

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def stopping(self) -> None:
        """Say that the current batch is the last one; safe inside a signal handler."""
        message = "\nStopping after the current batch; press Ctrl-C again to stop at once.\n"
        os.write(sys.stderr.fileno(), message.encode())

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _rate(self) -> str:
        elapsed = time.monotonic() - self._started
        per_second = self._generated / elapsed
        left = (self._total - self._before - self._generated) / per_second
        return f"{format_rate(per_second)}, {format_duration(left)} left"


class FeatureProgress:
    """Shows on stderr the progress of feature extraction; only in the first process."""

    def __init__(self) -> None:
        self._bar = ConsoleProgress("Features")

    def __call__(self, done: int, total: int) -> None:
        """Show that the features of `done` of `total` images are extracted; begins with 0."""
        if not is_first_process():
            return
        if done == 0:
            self._bar.stop()
            self._bar.start(total, 0)
        self._bar.update(done)
        if done == total:
            self._bar.stop()

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def format_rate(per_second: float) -> str:
    """Images per second, or seconds per image if that is easier to read."""
    return f"{per_second:.2f} images/s" if per_second >= 1 else f"{1 / per_second:.2f} s/image"


def format_count(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_duration(seconds: float) -> str:
    """A duration for people, such as `2 d 3 h`, `1 h 05 min`, `3 min 20 s` or `12 s`."""
    total = round(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {total % 60:02d} s" if minutes else f"{total} s"
