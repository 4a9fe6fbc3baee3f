"""What is done, missing and broken in run folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sd_tokenmerge.sampling.description import RUN_FILE, read_description, unusable
from sd_tokenmerge.sampling.folder import survey_folder
from sd_tokenmerge.sampling.lock import is_locked
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import planned_files


@dataclass(frozen=True)
class RunStatus:
    """The state of one run folder.

    Attributes:
        folder: the run folder.
        method: its method string.
        keep_rate: its keep rate.
        total: images of the run.
        done: images that are there as recorded.
        missing: images that are not there.
        broken: images whose content is not what was recorded, or that no record vouches for.
        findings: what is wrong, a line each.
        is_running: whether a process is generating into it now.
    """

    folder: str
    method: str
    keep_rate: float | str
    total: int
    done: int
    missing: int
    broken: int
    findings: tuple[str, ...]
    is_running: bool

    @property
    def is_complete(self) -> bool:
        """Whether every image is there, and nothing is wrong."""
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


def run_status(folder: str | Path) -> RunStatus:
    """Read every image of a run folder and compare it with the manifest; writes nothing.

    Raises:
        ValueError: it is no run folder, or its `run.json` is damaged.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description is None:
        raise ValueError(f"`folder` must hold a {RUN_FILE}, got {str(folder)!r} without one.")
    try:
        options = GenerateOptions.from_json(description["options"])
    except (AttributeError, TypeError, ValueError) as error:
        raise unusable(folder / RUN_FILE, f"has bad options ({error})") from error
    is_running = is_locked(folder)
    survey = survey_folder(
        folder,
        planned_files(options, description["plan"]["num_images"]),
        own_parts=[] if is_running else None,
    )
    if is_running:  # an image is there for a moment before its record is
        survey = replace(survey, unrecorded=[], missing=survey.missing + survey.unrecorded)
    return RunStatus(
        folder=str(folder),
        method=options.method,
        keep_rate=description["options"]["keep_rate"],
        total=description["plan"]["num_images"],
        done=len(survey.intact),
        missing=len(survey.missing) + len(survey.lost),
        broken=len(survey.changed) + len(survey.unrecorded),
        findings=tuple(survey.findings()),
        is_running=is_running,
    )
