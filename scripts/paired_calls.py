"""Bare pipeline calls beside the batches of a run, with the time of each of their steps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import torch

from sd_tokenmerge.sampling import run as run_module
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import Batch, plan_batches, plan_images
from sd_tokenmerge.sampling.progress import LoggedProgress
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.writer import ImageWriter

_FIRST_STEPS = 2
"""The middle of a call begins after so many steps, or later."""


class Cost(NamedTuple):
    """Wall and CPU seconds of the whole process."""

    wall_s: float
    cpu_s: float

    @staticmethod
    def now() -> Cost:
        """What the clocks say."""
        return Cost(time.perf_counter(), time.process_time())

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


@dataclass
class Call:
    """One call: when it began, when each step was at its end, when all was done."""

    begin: Cost
    steps: list[Cost] = field(default_factory=list)
    end: Cost | None = None
    settled: int = _FIRST_STEPS
    """After how many steps the batch before was stored, at least `_FIRST_STEPS`."""

    @property
    def whole(self) -> Cost:
        """The whole call."""
        assert self.end is not None
        return self.end - self.begin

    def without_middle(self, first: int) -> Cost:
        """The call without the steps after the first ones, up to the last one's end."""
        middle = self.steps[-1] - self.steps[min(first, len(self.steps)) - 1]
        return self.whole - middle


class Clock:
    """Times one call after another."""

    def set(self) -> None:
        """A call begins."""
        self._call = Call(Cost.now())

    def tick(self, storing: bool) -> None:
        """A step has ended; at its end, was the batch before not stored yet?"""
        self._call.steps.append(Cost.now())
        if storing:  # perhaps up to the end of the next step
            self._call.settled = max(_FIRST_STEPS, len(self._call.steps) + 1)

    def read(self) -> Call:
        """The call has ended."""
        self._call.end = Cost.now()
        return self._call


def paired_calls(pipe: Any, options: ResolvedOptions) -> list[tuple[Call, Call]]:
    """A bare call and one of a run's loop, for all batches but the first.

    During the first one, nothing is stored yet.
    """
    turns = Turns(pipe, options)
    with (
        mock.patch.object(run_module, "ImageWriter", turns.make_writer),
        mock.patch.object(pipe.scheduler, "step", turns.timed(pipe.scheduler.step)),
    ):
        run_once(pipe, options, turns)
    return list(zip(turns.bare, turns.run, strict=True))[1:]


class Turns(LoggedProgress):
    """Makes bare calls between the batches of a run, as its progress."""

    def __init__(self, pipe: Any, options: ResolvedOptions):
        self.bare: list[Call] = []
        self.run: list[Call] = []
        self._pipe = pipe
        self._options = options
        self._batches = batches_of(options)
        self._clock = Clock()
        self._writer: HeldWriter | None = None

    def make_writer(self, *arguments: Any) -> HeldWriter:
        """The run's writer."""
        self._writer = HeldWriter(*arguments)
        return self._writer

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's step, which ends each denoising step, with a look at the clock."""

        @wraps(step)
        def timed_step(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            if self._options.device.startswith("cuda"):
                torch.cuda.synchronize()
            self._clock.tick(self._writer is not None and self._writer.is_storing())
            return result

        return timed_step

    def start(self, total: int, done: int) -> None:
        """The run is about to make its first batch."""
        self._call_bare()
        self._clock.set()

    def update(self, done_by_process: Sequence[int]) -> None:
        """The run has made a batch and handed it to its writer."""
        assert self._writer is not None
        self._writer.settle()
        self.run.append(self._clock.read())
        while len(self.bare) < len(self._batches) and len(self.bare) < _bare_after(len(self.run)):
            self._call_bare()
        self._clock.set()
        self._writer.release()

    def _call_bare(self) -> None:
        batch = self._batches[len(self.bare)]
        self._clock.set()
        call_bare(self._pipe, self._options, batch)
        self.bare.append(self._clock.read())


def _bare_after(runs: int) -> int:
    """How many bare calls come before the next batch: bare, run, run, bare, bare, run, ..."""
    return runs + 1 if runs % 2 == 0 else runs


class HeldWriter(ImageWriter):
    """Stores nothing until it is let: bare calls have the machine for themselves."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._held: list[tuple[Any, ...]] = []

    def submit(self, *image: Any) -> None:
        """Keep an image for later."""
        self._held.append(image)

    def release(self) -> None:
        """Store, in threads, what was submitted."""
        for image in self._held:
            super().submit(*image)
        self._held = []

    def is_storing(self) -> bool:
        """Whether something released is not stored yet."""
        return any(not future.done() for future in self._waiting)

    def settle(self) -> None:
        """Wait until everything that was released is stored."""
        for future in self._waiting:
            future.result()

    def close(self) -> None:
        """Store all, and wait."""
        self.release()
        super().close()


def run_once(pipe: Any, options: ResolvedOptions, progress: Any = None) -> Any:
    """A whole run in a new folder."""
    shutil.rmtree(options.out, ignore_errors=True)
    return generate(options, pipe=pipe, progress=progress)


def of_batches(options: ResolvedOptions, count: int) -> ResolvedOptions:
    """The same run with so many batches (or one image more), of two images per class."""
    images = count * options.batch_size
    return replace(options, classes=tuple(range(-(-images // 2))), images_per_class=2)


def batches_of(options: ResolvedOptions) -> list[Batch]:
    """The batches of a run."""
    return plan_batches(plan_images(options), options.batch_size, 0, 1)


def call_bare(pipe: Any, options: ResolvedOptions, batch: Batch) -> None:
    """The images of a batch, thrown away."""
    pipe(
        [job.prompt for job in batch],
        generator=[torch.Generator().manual_seed(job.seed) for job in batch],
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )
