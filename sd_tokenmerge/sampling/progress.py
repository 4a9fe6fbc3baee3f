"""How a run tells what it is doing; the command line shows it, the library stays silent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives a run's progress; called from one thread, in the first process only."""

    def start(self, total: int, done: int) -> None:
        """Generation begins: `done` of `total` images are already there."""

    def update(self, done_by_process: Sequence[int]) -> None:
        """Images finished since the start, by process."""

    def note(self, message: str) -> None:
        """Something worth a line, such as what was found damaged."""

    def stopping(self) -> None:
        """A signal arrived: the current batch is the last one. Called by the signal's handler."""

    def stop(self) -> None:
        """Nothing follows."""


class LoggedProgress:
    """Sends notes to the logging module and shows nothing else."""

    def start(self, total: int, done: int) -> None:  # noqa: D102
        logger.info("%d of %d images are there.", done, total)

    def update(self, done_by_process: Sequence[int]) -> None:  # noqa: D102
        logger.debug("%d images generated.", sum(done_by_process))

    def note(self, message: str) -> None:  # noqa: D102
        logger.warning(message)

    def stopping(self) -> None:  # noqa: D102
        return

    def stop(self) -> None:  # noqa: D102
        return
