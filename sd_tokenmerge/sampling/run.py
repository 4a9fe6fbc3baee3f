"""Generate a run's images into its folder, as often interrupted as need be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sd_tokenmerge.keep_rates import format_keep_rates, parse_keep_rates
from sd_tokenmerge.sampling.description import RUN_FILE, describe_run, version_differences
from sd_tokenmerge.sampling.folder import (
    check_folder,
    remove_temporaries,
    settle_description,
    survey_folder,
)
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.lock import FolderBusyError, lock_folder
from sd_tokenmerge.sampling.manifest import part_files, part_name, read_manifest, unite_manifests
from sd_tokenmerge.sampling.merging import patched
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import plan_batches, plan_images
from sd_tokenmerge.sampling.progress import LoggedProgress, Progress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.sampler import Sampler
from sd_tokenmerge.sampling.signals import StopRequest, stop_on_signals
from sd_tokenmerge.sampling.workers import Workers, find_workers
from sd_tokenmerge.sampling.writer import ImageWriter

_PATIENCE_AFTER_SIGNAL_S = 20.0


@dataclass(frozen=True)
class RunSummary:
    """What one start of a run did.

    Attributes:
        folder: the run folder.
        num_images: images of the run, or of this shard of it; all of them are there.
        already_there: how many were there, intact, before.
        generated: how many this start made, in all processes.
        findings: what was found damaged and has been made anew; pictures that are no part of the
            run are reported only.
        seconds: wall time of the generation, without loading the model.
    """

    folder: str
    num_images: int
    already_there: int
    generated: int
    findings: tuple[str, ...]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Throughput of all processes; 0 where nothing had to be made."""
        return self.generated / self.seconds if self.generated else 0.0


class RunStopped(KeyboardInterrupt):
    """A signal ended the run after a batch; every image that is there is whole and recorded."""


def generate(
    options: GenerateOptions,
    *,
    pipe: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Generate every image of a run that is not there yet.

    May be interrupted at any moment, also by SIGKILL, and started again: images that are there
    with the recorded hash are kept, everything else is made anew, and comes out the same.
    Under `accelerate launch`, all processes call this and share the work.

    Args:
        options: what to generate, and where.
        pipe: a pipeline that `load_pipeline` made from the same model options, to save loading it
            again; it must not be patched. Default: loaded here.
        overwrite: replace a run with other options that is in the folder.
        progress: what to show; default: the logging module.

    Raises:
        ValueError: an option is bad, the model cannot be loaded, or the folder holds another run or
            is in use. Nothing has been written then.
        OSError: the folder cannot be written to, or the disk is full. What is there is intact.
        RunStopped: SIGINT or SIGTERM arrived. What is there is intact.
    """
    with open_run(options, pipe=pipe, overwrite=overwrite, progress=progress) as run:
        return run.execute()


@contextmanager
def open_run(
    options: GenerateOptions,
    *,
    pipe: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """`generate` in two steps: what is wrong with the input shows on entering, before any work.

    Takes and raises what `generate` does.
    """
    resolved = resolve_options(options)
    if overwrite and resolved.shard_numbers()[1] > 1:
        raise ValueError("`overwrite` must be off with `shard`: it would remove the others' work.")
    run = Run(resolved, LoggedProgress() if progress is None else progress)
    check_folder(run.folder, resolved, overwrite)
    with ExitStack() as stack:
        run.prepare(stack, pipe, overwrite)
        yield run


@dataclass(frozen=True)
class _ToDo:
    missing: frozenset[str]
    already_there: int
    findings: tuple[str, ...]


class Run:
    """An opened run; see `open_run`."""

    def __init__(self, options: ResolvedOptions, progress: Progress):
        self.folder = Path(options.out)
        self._options = options
        self._progress = progress
        self._shard = options.shard_numbers()
        self._jobs = plan_images(options)
        self._batches = plan_batches(self._jobs, options.batch_size, *self._shard)
        self._own_jobs = [job for batch in self._batches for job in batch]

    @property
    def is_first_process(self) -> bool:
        """Whether this is the process that reports, of those launched together."""
        return self._workers.rank == 0

    def prepare(self, stack: ExitStack, pipe: Any, overwrite: bool) -> None:
        """Load and patch the pipeline, lock the folder, find out what is to be done."""
        self._workers: Workers = find_workers(self._options.device)
        self._options = replace(
            self._options, device=self._workers.own_device(self._options.device)
        )
        # A new folder is made only when the model is there; a complete one needs no model.
        is_resumed = not overwrite and (self.folder / RUN_FILE).exists()
        if not is_resumed:
            self._load(stack, pipe)
        self._todo = self._settle_folder(stack, overwrite)
        if is_resumed and self._todo.missing:
            self._load(stack, pipe)

    def _load(self, stack: ExitStack, pipe: Any) -> None:
        if pipe is None:
            pipe = load_pipeline(self._options)
        stack.enter_context(patched(pipe, self._options))
        self._sampler = Sampler(pipe, self._options)

    def _settle_folder(self, stack: ExitStack, overwrite: bool) -> _ToDo:
        """Let the first process look after the folder; all get its result, or its error."""
        result: _ToDo | Exception | None = None
        if self.is_first_process:
            try:
                result = self._set_up_folder(stack, overwrite)
            except (ValueError, OSError) as error:
                result = error
        result = self._workers.broadcast(result)
        if isinstance(result, Exception):
            raise result
        if result is None or not (self.folder / RUN_FILE).exists():
            raise ValueError(
                f"`out` must be a folder that all processes share, got {str(self.folder)!r}, which "
                f"process {self._workers.rank} does not see. Machines without a common disk can "
                f"each take a `shard`."
            )
        return result

    def _set_up_folder(self, stack: ExitStack, overwrite: bool) -> _ToDo:
        """Lock the folder, compare, clean up, and find out what is missing."""
        description = describe_run(self._options, self._jobs)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._shard[1] > 1:
            stack.callback(self._unite_shards)
        lock = stack.enter_context(lock_folder(self.folder, *self._shard))
        before = settle_description(self.folder, description, self._options, overwrite)
        lock.end_set_up()
        if before is not None and (changed := version_differences(before, description)):
            self._progress.note(
                f"The run was begun with other versions ({', '.join(changed)}); new images may "
                f"differ from those it made."
            )
        remove_temporaries(self.folder, self._own_jobs)
        wanted = {job.file: job for job in self._own_jobs}
        survey = survey_folder(
            self.folder,
            list(wanted),
            all_files={job.file for job in self._jobs},
            own_parts=part_files(self.folder, *self._shard),
            is_right=lambda record: record.job == wanted[record.file],
        )
        for finding in survey.findings():
            self._progress.note(f"Found {finding}")
        unite_manifests(self.folder, *self._shard, records=survey.intact.values())
        missing = frozenset(wanted) - set(survey.intact)
        return _ToDo(missing, len(survey.intact), tuple(survey.findings()))

    def execute(self) -> RunSummary:
        """Generate what is missing; see `generate`."""
        start = time.perf_counter()
        if self.is_first_process:
            self._progress.start(len(self._own_jobs), self._todo.already_there)
        try:
            with stop_on_signals(self._on_signal) as request:
                self._work(request)
                is_patient = partial(self._is_patient, request)
                complete = self._workers.wait(is_patient)
                generated = sum(self._workers.done())
                self._workers.leave(is_patient)
        finally:
            if self.is_first_process:
                self._progress.stop()
        if not complete or generated < len(self._todo.missing):
            done = self._todo.already_there + generated
            died = not complete and not request.signal_number
            why = "another process has failed" if died else "stopped after the current batch"
            raise RunStopped(
                f"{why}: {done} of {len(self._own_jobs)} images are "
                f"done. Run the same command again to go on."
            )
        if self.is_first_process:
            unite_manifests(self.folder, *self._shard)
        if request.signal_number:  # in the last batch; else a sweep would go on
            raise RunStopped(
                f"stopped after the last batch: all {len(self._own_jobs)} images are done."
            )
        return RunSummary(
            folder=str(self.folder),
            num_images=len(self._own_jobs),
            already_there=self._todo.already_there,
            generated=generated,
            findings=self._todo.findings,
            seconds=time.perf_counter() - start,
        )

    def _work(self, request: StopRequest) -> None:
        """Take batches until there are none, or until a signal arrives."""
        missing = self._todo.missing
        batches = [b for b in self._batches if any(job.file in missing for job in b)]
        part = self.folder / part_name(*self._shard, self._workers.rank)
        writer = ImageWriter(self.folder, part, _png_text(self._options))
        try:
            while (number := self._workers.take()) < len(batches):
                batch = batches[number]
                sampled = self._sampler(batch)
                new = 0
                for job, pixels, flag in zip(batch, sampled.pixels, sampled.flagged, strict=True):
                    if job.file in missing:
                        writer.submit(job, pixels, sampled.seconds, flag)
                        new += 1
                self._workers.add_done(new)
                self._show()
                if request.signal_number:
                    self._workers.take_no_more()
            writer.close()
        except BaseException:
            with suppress(OSError):
                writer.close()
            with suppress(RuntimeError):  # the first process may be gone
                self._workers.take_no_more()
                self._workers.fail()
            raise

    def _on_signal(self) -> None:
        if self.is_first_process:
            self._progress.stopping()

    def _show(self) -> None:
        if self.is_first_process:
            self._progress.update(self._workers.done())

    def _is_patient(self, request: StopRequest) -> bool:
        self._show()
        return request.age_s() < _PATIENCE_AFTER_SIGNAL_S

    def _unite_shards(self) -> None:
        """After the last shard, put all manifests together; while others run, leave them."""
        with suppress(FolderBusyError, ValueError), lock_folder(self.folder):
            recorded = {record.file for record in read_manifest(self.folder)}
            if recorded.issuperset(job.file for job in self._jobs):
                unite_manifests(self.folder)


def _png_text(options: ResolvedOptions) -> dict[str, str]:
    return {
        "method": options.method,
        "keep_rate": format_keep_rates(parse_keep_rates(options.keep_rate)),
        "steps": str(options.steps),
        "guidance_scale": f"{options.guidance_scale:g}",
    }
