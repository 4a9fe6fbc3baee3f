"""Run a sweep: generate missing images, measure every setting, write the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from sd_tokenmerge.processes import Processes
from sd_tokenmerge.report.rows import SweepRow
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.progress import LoggedProgress, Progress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sweep.folder import write_plan, write_results
from sd_tokenmerge.sweep.measure import Measurer
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.plan import SweepPlan, plan_sweep
from sd_tokenmerge.sweep.results import Results, make_results
from sd_tokenmerge.sweep.settings import Setting

_SET_UP_TIMEOUT_S = 60.0


class SweepProgress(Protocol):
    """Receives a sweep's progress."""

    def generating(self, name: str, number: int, count: int) -> Progress:
        """The progress of run `number` of `count`, from 1."""

    def extracting(self, done: int, total: int) -> None:
        """Features of `done` of `total` images are extracted; the first call has 0."""


class LoggedSweepProgress(LoggedProgress):
    """Sends notes to the logging module and shows nothing else."""

    def generating(self, name: str, number: int, count: int) -> Progress:  # noqa: D102
        return self

    def extracting(self, done: int, total: int) -> None:  # noqa: D102
        return


@dataclass(frozen=True)
class SweepSummary:
    """The work of one start of a sweep.

    Attributes:
        folder: the sweep's folder.
        results: all rows with their conditions; None for a shard, which measures nothing.
        num_generated: number of generated images.
        files: names of the tables, plots and pictures.
    """

    folder: Path
    results: Results | None
    num_generated: int
    files: tuple[str, ...] = ()


def run_sweep(
    options: SweepOptions, *, overwrite: bool = False, progress: SweepProgress | None = None
) -> SweepSummary | None:
    """Generate and measure every setting of a sweep, and write its tables, plots and pictures.

    May be interrupted at any moment and started again: finished images are kept, features come
    from the cache, and the results are written again. They appear after the first setting and are
    updated after every setting that is generated. Under `accelerate launch`, all processes call
    this and share the work. Independent jobs can each generate a `shard` of every setting; a start
    without a shard then measures.

    Args:
        options: the settings to compare.
        overwrite: replace runs with other options that are in the folder.
        progress: receives the progress; default: the logging module.

    Returns:
        A summary; None in a process that is not the first of several.

    Raises:
        ValueError: an option is invalid, the reference cannot be used, or the folder holds
            something else or is in use. Nothing has been generated.
        OSError: the folder cannot be written to, or the disk is full. Finished images are intact.
        RunStopped: SIGINT or SIGTERM arrived. Finished images are intact.
    """
    progress = LoggedSweepProgress() if progress is None else progress
    is_shard = options.generation.shard is not None
    model = resolve_options(options.generation)
    processes = Processes.join(model.device)
    plan = processes.agree(lambda: plan_sweep(options, overwrite=overwrite))
    measurer = Measurer(options, progress.extracting)
    pipe = None
    if plan.num_missing:
        pipe = load_pipeline(replace(model, device=str(processes.device)))
    if not is_shard:
        measurer.load_reference()
    with _claimed_folder(Path(options.out), plan, processes, is_shard):
        if is_shard:
            num_generated = sum(_generate(plan, i, pipe, progress) for i in range(len(plan.runs)))
            summary = SweepSummary(Path(options.out), None, num_generated)
            return summary if processes.is_first else None
        return _execute(options, plan, pipe, measurer, progress, processes.is_first)


def _execute(
    options: SweepOptions,
    plan: SweepPlan,
    pipe: Any,
    measurer: Measurer,
    progress: SweepProgress,
    is_first: bool,
) -> SweepSummary | None:
    """Generate and measure one setting after the other."""
    folder = Path(options.out)
    unmerged = plan.runs[0].setting
    measured: list[tuple[Setting, SweepRow]] = []
    num_generated = 0
    summary = None
    for index, run in enumerate(plan.runs):
        generated = _generate(plan, index, pipe, progress)
        num_generated += generated
        baseline = None if index == 0 else unmerged
        row = measurer.measure(run.setting, baseline, is_first_process=is_first)
        if row is None:
            continue
        measured.append((run.setting, row))
        missing = len(plan.runs) - len(measured)
        if generated or not missing:
            done = f"{len(measured)} of {len(plan.runs)} settings are done so far."
            results = make_results(options, measured, [*([done] if missing else []), *plan.skipped])
            files = results.files()
            write_results(folder, files)
            summary = SweepSummary(folder, results, num_generated, tuple(files))
    return summary


def _generate(plan: SweepPlan, index: int, pipe: Any, progress: SweepProgress) -> int:
    """Generate the missing images of a run, and return how many they were."""
    run = plan.runs[index]
    if run.num_missing and run.setting.options.compile:
        # Every patch is a new graph, and after a few of them dynamo would stop compiling.
        torch.compiler.reset()
    summary = generate(
        run.setting.options,
        pipe=pipe,
        overwrite=run.is_replaced,
        progress=progress.generating(str(run.setting), index + 1, len(plan.runs))
        if run.num_missing
        else LoggedProgress(),
    )
    return summary.generated


@contextmanager
def _claimed_folder(
    folder: Path, plan: SweepPlan, processes: Processes, is_shard: bool
) -> Iterator[None]:
    """Write the plan, and keep other sweeps out of the folder."""
    lock = FileLock(folder / ".sweep.lock")

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_SET_UP_TIMEOUT_S if is_shard else 0)
        except Timeout:
            raise ValueError(
                f"`out` must not be in use, got {str(folder)!r}: another sweep is running there."
            ) from None
        write_plan(folder, [run.planned for run in plan.runs])
        if is_shard:  # run folders have locks of their own
            lock.release()

    processes.agree(claim)
    try:
        yield
    finally:
        lock.release()
