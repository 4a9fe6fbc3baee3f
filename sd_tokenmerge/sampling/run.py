"""Generate a run's images into its folder, resuming where an earlier start ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sd_tokenmerge.keep_rates import format_keep_rates
from sd_tokenmerge.processes import Processes
from sd_tokenmerge.sampling.batch_counter import BatchCounter, ProcessLostError, lost_processes
from sd_tokenmerge.sampling.description import RUN_FILE, describe_run, version_differences
from sd_tokenmerge.sampling.folder import (
    check_folder,
    prepare_files,
    settle_description,
    survey_folder,
)
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.lock import FolderBusyError, lock_folder
from sd_tokenmerge.sampling.manifest import part_files, part_name, read_manifest, unite_manifests
from sd_tokenmerge.sampling.merging import patched
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import plan_batches, plan_images
from sd_tokenmerge.sampling.progress import LoggedProgress, Progress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.sampler import Sampler
from sd_tokenmerge.sampling.signals import StopRequest, stop_on_signals
from sd_tokenmerge.sampling.writer import ImageWriter

_SHARED_FOLDER_TIMEOUT_S = 90.0
"""Network file systems may show a new file to other machines only after a minute."""


@dataclass(frozen=True)
class RunSummary:
    """The work of one start of a run.

    Attributes:
        folder: the run folder.
        num_images: images of the run, or of its shard; all of them are stored.
        already_there: intact images found at the start.
        generated: images that this start generated, in all processes.
        findings: damage that was found and repaired, and pictures that are not part of the run.
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
        """Throughput of all processes; 0 if nothing was generated."""
        return self.generated / self.seconds if self.generated else 0.0


class RunStopped(KeyboardInterrupt):
    """A signal ended the run after a batch; every stored image is complete and recorded."""


class NotANumberError(ArithmeticError):
    """The pipeline returned NaN for some images, which were not stored; all others were.

    Attributes:
        files: names of these images.
    """

    def __init__(self, files: list[str], num_images: int):
        self.files = files
        names = ", ".join(files[:20]) + (", ..." if len(files) > 20 else "")
        super().__init__(
            f"{len(files)} of {num_images} images have NaN pixels and were not stored: {names}"
        )


def generate(
    options: GenerateOptions,
    *,
    pipe: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Generate the missing images of a run.

    May be interrupted at any moment, even by SIGKILL, and started again: intact images are kept,
    and all others are generated again with the same result. Under `accelerate
    launch`, all processes call this and share the work.

    Args:
        options: what to generate, and where.
        pipe: a pipeline from `load_pipeline` with the same model options, to avoid loading it
            again; it must not be patched. Default: loaded here.
        overwrite: replace a run with other options that is in the folder.
        progress: receives the progress; default: the logging module.

    Raises:
        ValueError: an option is invalid, the model cannot be loaded, or the folder holds another
            run or is in use. Nothing has been written.
        OSError: the folder cannot be written to, or the disk is full. Stored images are intact.
        NotANumberError: some images have NaN pixels; all others are stored.
        RunStopped: SIGINT or SIGTERM arrived. Stored images are intact.
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
    """`generate` in two steps: bad input raises on entering, before any image is generated.

    Arguments and errors are those of `generate`.
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
class _Work:
    """The work that a start has to do.

    Attributes:
        missing: names of the images to generate.
        already_there: number of intact images.
        findings: the damage that was found.
    """

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
        """Whether this is the process that reports, among those launched together."""
        return self._processes.is_first

    def prepare(self, stack: ExitStack, pipe: Any, overwrite: bool) -> None:
        """Load and patch the pipeline, lock the folder, and find the missing images."""
        self._processes = Processes.join(self._options.device)
        self._counter = BatchCounter(self._processes)
        self._options = replace(self._options, device=str(self._processes.device))
        # A new folder is created only once the model is loaded; a complete one needs no model.
        is_resumed = not overwrite and (self.folder / RUN_FILE).exists()
        if not is_resumed:
            self._load(stack, pipe)
        self._work = self._processes.agree(lambda: self._set_up_folder(stack, overwrite))
        self._require_shared_folder()
        if is_resumed and self._work.missing:
            self._load(stack, pipe)

    def _load(self, stack: ExitStack, pipe: Any) -> None:
        if pipe is None:
            pipe = load_pipeline(self._options)
        stack.enter_context(patched(pipe, self._options))
        self._sampler = Sampler(pipe, self._options)

    def _require_shared_folder(self) -> None:
        """Wait until this process sees the files of the first one."""
        deadline = time.monotonic() + _SHARED_FOLDER_TIMEOUT_S
        while not (self.folder / RUN_FILE).exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"`out` must be a folder that all processes share, got {str(self.folder)!r}, "
                    f"which process {self._processes.rank} does not see. Machines without a common "
                    f"disk can each take a `shard`."
                )
            time.sleep(0.2)

    def _set_up_folder(self, stack: ExitStack, overwrite: bool) -> _Work:
        """Lock the folder, compare it with the options, clean up, and find the missing images."""
        description = describe_run(self._options, self._jobs)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._shard[1] > 1:
            stack.callback(self._unite_shards)
        end_set_up = stack.enter_context(lock_folder(self.folder, *self._shard))
        before = settle_description(self.folder, description, self._options, overwrite)
        end_set_up()
        if before is not None and (changed := version_differences(before, description)):
            self._progress.note(
                f"The run was started with other versions ({', '.join(changed)}); new images may "
                f"differ from the existing ones."
            )
        prepare_files(self.folder, self._own_jobs)
        wanted = {job.file: job for job in self._own_jobs}
        survey = survey_folder(
            self.folder,
            list(wanted),
            hash_all=False,
            all_files={job.file for job in self._jobs},
            own_parts=part_files(self.folder, *self._shard),
            is_right=lambda record: record.job == wanted[record.file],
        )
        for finding in survey.findings():
            self._progress.note(f"Found {finding}")
        unite_manifests(self.folder, *self._shard, records=survey.intact.values())
        missing = frozenset(wanted) - set(survey.intact)
        return _Work(missing, len(survey.intact), tuple(survey.findings()))

    def execute(self) -> RunSummary:
        """Generate the missing images; see `generate`."""
        start = time.perf_counter()
        if self.is_first_process:
            self._progress.start(len(self._own_jobs), self._work.already_there)
        try:
            with stop_on_signals(self._on_signal) as request:
                stored, not_numbers = self._generate(request)
                with lost_processes():  # waits for the others
                    ends = self._processes.gather((stored, not_numbers, request.signal_number))
        except ProcessLostError as error:
            recorded = {record.file for record in read_manifest(self.folder)}
            done = sum(job.file in recorded for job in self._own_jobs)
            raise self._stopped("another process has failed", done) from error
        finally:
            if self.is_first_process:
                self._progress.stop()
        generated = sum(end[0] for end in ends)
        not_numbers = [name for end in ends for name in end[1]]
        done = self._work.already_there + generated
        if generated + len(not_numbers) < len(self._work.missing):
            raise self._stopped("stopped after the current batch", done)
        if self.is_first_process:
            unite_manifests(self.folder, *self._shard)
        if any(end[2] for end in ends):  # during the last batch; otherwise a sweep would continue
            raise RunStopped(f"stopped after the last batch: all {done} images are done.")
        if not_numbers:
            raise NotANumberError(not_numbers, len(self._own_jobs))
        return RunSummary(
            folder=str(self.folder),
            num_images=len(self._own_jobs),
            already_there=self._work.already_there,
            generated=generated,
            findings=self._work.findings,
            seconds=time.perf_counter() - start,
        )

    def _generate(self, request: StopRequest) -> tuple[int, list[str]]:
        """Take batches until none are left or a signal arrives.

        Returns:
            Number of images stored, and names of those with NaN pixels.
        """
        missing = self._work.missing
        batches = [b for b in self._batches if any(job.file in missing for job in b)]
        part = self.folder / part_name(*self._shard, self._processes.rank)
        writer = ImageWriter(self.folder, part, _png_text(self._options))
        stored, not_numbers = 0, []
        try:
            while (number := self._counter.take()) < len(batches):
                batch = batches[number]
                sampled = self._sampler(batch)
                before = stored
                for job, pixels, flag in zip(batch, sampled.pixels, sampled.flagged, strict=True):
                    if job.file not in missing:
                        continue
                    if np.isnan(pixels.min()):
                        not_numbers.append(job.file)
                        self._progress.note(f"{job.file} has NaN pixels and is not stored.")
                    else:
                        writer.submit(job, pixels, sampled.seconds, flag)
                        stored += 1
                done = self._counter.add_done(stored - before)
                if self.is_first_process:
                    self._progress.update(done)
                if request.signal_number:
                    self._counter.take_no_more()
            writer.close()
        except BaseException:
            with suppress(OSError):
                writer.close()
            with suppress(ProcessLostError):  # the first process may be gone
                self._counter.take_no_more()
            raise
        return stored, not_numbers

    def _stopped(self, reason: str, done: int) -> RunStopped:
        return RunStopped(
            f"{reason}: {done} of {len(self._own_jobs)} images are done. Run the same command "
            f"again to continue."
        )

    def _on_signal(self) -> None:
        if self.is_first_process:
            self._progress.stopping()

    def _unite_shards(self) -> None:
        """Unite all manifests after the last shard; as long as others run, leave them."""
        with suppress(FolderBusyError, ValueError), lock_folder(self.folder):
            recorded = {record.file for record in read_manifest(self.folder)}
            if recorded.issuperset(job.file for job in self._jobs):
                unite_manifests(self.folder)


def _png_text(options: ResolvedOptions) -> dict[str, str]:
    config = options.merging
    return {
        "method": NO_METHOD if config is None else str(config.method),
        "keep_rate": "1" if config is None else format_keep_rates(config.keep_rate),  # type: ignore[arg-type]
        "steps": str(options.steps),
        "guidance_scale": f"{options.guidance_scale:g}",
    }
