"""How a run reports its progress: shown by the command line, silent in the library."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives a run's progress; called from one thread, in the first process only."""

    def start(self, total: int, done: int) -> None:
        """Generation begins: `done` of `total` images are already there."""

    def update(self, generated: int) -> None:
        """Images that all processes have generated since the start."""

    def note(self, message: str) -> None:
        """A message, such as a report of damage."""

    def stopping(self) -> None:
        """A signal arrived: the current batch is the last one. Called by the signal's handler."""

    def stop(self) -> None:
        """Generation has ended."""


class LoggedProgress:
    """Passes notes to the logging module and shows nothing else."""

    def start(self, total: int, done: int) -> None:  # noqa: D102
        logger.info("%d of %d images are already there.", done, total)

    def update(self, generated: int) -> None:  # noqa: D102
        logger.debug("%d images generated.", generated)

    def note(self, message: str) -> None:  # noqa: D102
        logger.warning(message)

    def stopping(self) -> None:  # noqa: D102
        return

    def stop(self) -> None:  # noqa: D102
        return
