"""The state of run folders: images done, missing and broken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sd_tokenmerge.keep_rates import format_keep_rates
from sd_tokenmerge.sampling.description import RUN_FILE, read_description
from sd_tokenmerge.sampling.folder import survey_folder
from sd_tokenmerge.sampling.lock import is_locked
from sd_tokenmerge.sampling.options import NO_METHOD
from sd_tokenmerge.sampling.plan import planned_files


@dataclass(frozen=True)
class RunStatus:
    """The state of one run folder.

    Attributes:
        folder: the run folder.
        method: its method string, `"none"` for the unpatched pipeline.
        keep_rate: its keep rate, as text.
        total: images of the run.
        done: intact images.
        missing: images without a file.
        broken: images that differ from their record or have none.
        findings: problems, one line each.
        is_running: whether a process is generating into it now.
    """

    folder: str
    method: str
    keep_rate: str
    total: int
    done: int
    missing: int
    broken: int
    findings: tuple[str, ...]
    is_running: bool

    @property
    def is_complete(self) -> bool:
        """Whether every image is intact and there is no other problem."""
        return self.done == self.total and not self.findings

    @property
    def state(self) -> str:
        """The state in a word."""
        if self.is_running:
            return "running"
        if self.is_complete:
            return "complete"
        if self.findings:
            return "damaged"
        return "unfinished" if self.done else "not begun"


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders at or below a folder, such as a sweep's."""
    return sorted(path.parent for path in Path(folder).rglob(RUN_FILE))


def run_status(folder: str | Path, *, hash_all: bool = True) -> RunStatus:
    """Compare every image of a run folder with its manifest; writes nothing.

    Args:
        folder: the run folder.
        hash_all: hash every image; otherwise only those whose size or modification time is not the
            recorded one.

    Raises:
        DescriptionError: its `run.json` is damaged.
        ValueError: it is not a run folder.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description is None:
        raise ValueError(f"`folder` must hold a {RUN_FILE}, got {str(folder)!r} without one.")
    is_running = is_locked(folder)
    survey = survey_folder(
        folder,
        planned_files(description.options, description.num_images),
        hash_all=hash_all,
        own_parts=[] if is_running else None,
    )
    if is_running:  # an image is there for a moment before its record
        survey = replace(survey, unrecorded=[], missing=survey.missing + survey.unrecorded)
    merging = description.options.merging
    return RunStatus(
        folder=str(folder),
        method=NO_METHOD if merging is None else str(merging.method),
        keep_rate="1" if merging is None else format_keep_rates(merging.keep_rate),  # type: ignore[arg-type]
        total=description.num_images,
        done=len(survey.intact),
        missing=len(survey.missing) + len(survey.lost),
        broken=len(survey.changed) + len(survey.unrecorded),
        findings=tuple(survey.findings()),
        is_running=is_running,
    )
