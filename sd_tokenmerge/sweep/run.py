"""Carry a sweep out: generate what is missing, measure what changed, write what is out of date."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from sd_tokenmerge.files import write_atomically
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.manifest import has_content
from sd_tokenmerge.sampling.progress import LoggedProgress, Progress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.workers import Workers, find_workers
from sd_tokenmerge.sweep.measure import Measurer
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.plan import PlannedRun, SweepPlan, plan_sweep
from sd_tokenmerge.sweep.results import (
    Results,
    chosen_records,
    draw_pictures,
    make_results,
    picture_hashes,
)
from sd_tokenmerge.sweep.settings import Setting
from sd_tokenmerge.sweep.state import STATE_FILE, Measurement, SweepState

_SET_UP_TIMEOUT_S = 60.0


class SweepProgress(Protocol):
    """Receives a sweep's progress."""

    def generating(self, name: str, number: int, count: int) -> Progress:
        """What to show while a run is generated: run `number` of `count`, from 1."""

    def extracting(self, done: int, total: int) -> None:
        """Features of `done` of `total` images are extracted; the first call has 0."""

    def note(self, message: str) -> None:
        """Something worth a line."""


class LoggedSweepProgress(LoggedProgress):
    """Sends notes to the logging module and shows nothing else."""

    def generating(self, name: str, number: int, count: int) -> Progress:  # noqa: D102
        return self

    def extracting(self, done: int, total: int) -> None:  # noqa: D102
        return


@dataclass(frozen=True)
class SweepSummary:
    """What one start of a sweep did.

    Attributes:
        folder: the sweep's folder.
        results: all rows with their conditions; None for a shard, which measures nothing.
        num_generated: images this start made.
        num_measured: settings this start measured.
        files: the tables, plots and pictures, by name.
        num_written: how many of them this start wrote.
    """

    folder: Path
    results: Results | None
    num_generated: int
    num_measured: int
    files: tuple[str, ...]
    num_written: int


def run_sweep(
    options: SweepOptions, *, overwrite: bool = False, progress: SweepProgress | None = None
) -> SweepSummary | None:
    """Generate and measure every setting of a sweep, and write its tables and plots.

    May be interrupted at any moment and started again: whatever was made from the same content is
    kept. Tables appear after the first setting and grow with every other one. Under `accelerate
    launch`, all processes call this and share the work. Jobs that know nothing of each other can
    each take a `shard` of every setting; a start without a shard then measures.

    Args:
        options: what to compare.
        overwrite: replace runs with other options that are in the folder.
        progress: what to show; default: the logging module.

    Returns:
        What was done; None in a process that is not the first of several.

    Raises:
        ValueError: an option is bad, the folder holds something else, or is in use.
        OSError: the folder cannot be written to, or the disk is full. What is there is intact.
        RunStopped: SIGINT or SIGTERM arrived. What is there is intact.
    """
    sweep = _Sweep(options, overwrite, LoggedSweepProgress() if progress is None else progress)
    with sweep.locked():
        return sweep.execute()


class _Sweep:
    def __init__(self, options: SweepOptions, overwrite: bool, progress: SweepProgress) -> None:
        """Check everything and load the model, where it is needed; writes nothing."""
        self._options = options
        self._progress = progress
        self._model = resolve_options(options.generation)
        self._workers: Workers = find_workers(self._model.device)
        self._folder = Path(options.out)
        self._lock = FileLock(self._folder / ".sweep.lock")
        self._plan: SweepPlan = self._agree(lambda: plan_sweep(options, overwrite=overwrite))
        self._state: SweepState = self._agree(lambda: SweepState.read(self._folder))
        self._measurer = Measurer(options, progress.extracting)
        self._pipe = self._load_pipeline() if self._plan.num_missing else None
        self._is_shard = options.generation.shard is not None
        self._num_generated = 0
        self._num_measured = 0
        self._num_written = 0

    @property
    def _is_first(self) -> bool:
        return self._workers.rank == 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second sweep out of the folder."""
        self._agree(self._take_folder)
        if self._is_shard:  # only its own run folders are closed to others
            self._lock.release()
        try:
            yield
        finally:
            self._lock.release()

    def _take_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_SET_UP_TIMEOUT_S if self._is_shard else 0)
        except Timeout:
            raise ValueError(
                f"`out` must not be in use, got {str(self._folder)!r}: another sweep is running "
                f"there."
            ) from None
        plan = [run.planned for run in self._plan.runs]
        if self._state.plan != plan or not (self._folder / STATE_FILE).exists():
            self._state.plan = plan
            self._state.write(self._folder)

    def _load_pipeline(self) -> Any:
        device = self._workers.own_device(self._model.device)
        return load_pipeline(replace(self._model, device=device))

    def execute(self) -> SweepSummary | None:
        """Do everything that is not done yet."""
        if self._is_shard:
            return self._generate_shard()
        done: list[tuple[Setting, Measurement]] = []
        baseline = self._plan.runs[0].setting.folder
        for number, run in enumerate(self._plan.runs, start=1):
            made = self._generate(run, number)
            measurement = self._measure(run.setting, None if number == 1 else baseline)
            if measurement is None:
                continue
            done.append((run.setting, measurement))
            if made and number < len(self._plan.runs):
                missing = f"{number} of {len(self._plan.runs)} settings are done so far."
                results = make_results(self._options, done, [missing, *self._plan.skipped])
                self._write(results.tables(), key="")
        return self._finish(done) if self._is_first else None

    def _generate_shard(self) -> SweepSummary | None:
        """Generate this shard of every setting."""
        for number, run in enumerate(self._plan.runs, start=1):
            self._generate(run, number)
        if not self._is_first:
            return None
        return SweepSummary(self._folder, None, self._num_generated, 0, (), 0)

    def _generate(self, run: PlannedRun, number: int) -> bool:
        """Generate what is missing of a run; whether anything was."""
        setting = run.setting
        if run.num_missing and setting.options.compile:
            # Every patch is a new graph, and after a few of them dynamo would stop compiling.
            torch.compiler.reset()
        summary = generate(
            setting.options,
            pipe=self._pipe,
            overwrite=run.is_replaced,
            progress=self._progress.generating(str(setting), number, len(self._plan.runs))
            if run.num_missing
            else LoggedProgress(),
        )
        self._num_generated += summary.generated
        return summary.generated > 0

    def _measure(self, setting: Setting, baseline: Path | None) -> Measurement | None:
        """Measure a run, if that was not done with the same content; None if not the first."""
        name = setting.folder.name
        key = self._agree(lambda: self._measurer.key(setting.folder, baseline))
        known = self._agree(lambda: self._state.measurement(name, key))
        if known is not None:
            return known if self._is_first else None
        measurement = self._measurer.measure(
            setting.folder, baseline, is_first_process=self._is_first
        )
        if measurement is not None:
            self._num_measured += 1
            self._state.record(name, key, measurement)
            self._state.write(self._folder)
        return measurement

    def _finish(self, done: list[tuple[Setting, Measurement]]) -> SweepSummary:
        results = make_results(self._options, done, self._plan.skipped)
        settings = [setting for setting, _ in done]
        records = chosen_records(settings[0].folder, self._options.sheet_images)
        key = results.key(picture_hashes(settings, records))
        if not self._is_up_to_date(key):
            pictures = draw_pictures(settings, records, results.conditions)
            self._write(results.tables() | results.plots() | pictures, key)
        return SweepSummary(
            folder=self._folder,
            results=results,
            num_generated=self._num_generated,
            num_measured=self._num_measured,
            files=tuple(self._state.results["files"]),
            num_written=self._num_written,
        )

    def _is_up_to_date(self, key: str) -> bool:
        written = self._state.results
        return written.get("key") == key and all(
            has_content(self._folder / name, digest) for name, digest in written["files"].items()
        )

    def _write(self, files: dict[str, bytes], key: str) -> None:
        """Write results, remove those of before that no longer belong to them."""
        before = self._state.results.get("files", {})
        for name in before.keys() - files.keys() if key else ():
            (self._folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            write_atomically(self._folder / name, data)
        self._num_written = len(files)
        written = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self._state.results = {"key": key, "files": written if key else before | written}
        self._state.write(self._folder)

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """Let the first process decide; all get its result, or its error."""
        result: Any = None
        if self._is_first:
            try:
                result = decide()
            except (ValueError, OSError) as error:
                result = error
        result = self._workers.broadcast(result)
        if isinstance(result, Exception):
            raise result
        return result
