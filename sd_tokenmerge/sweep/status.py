"""The state of a run folder, a sweep folder, or a folder of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_tokenmerge.files import describe_error
from sd_tokenmerge.sampling.description import RUN_FILE
from sd_tokenmerge.sampling.status import RunStatus, find_runs, run_status
from sd_tokenmerge.sweep.folder import (
    RUNS,
    SWEEP_FILE,
    PlannedSetting,
    count_tabulated,
    read_plan,
)


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep besides its images.

    Attributes:
        folder: the sweep's folder.
        settings: number of settings, including the unmerged pipeline.
        tabulated: number of settings in the tables.
        findings: problems, one line each.
    """

    folder: str
    settings: int
    tabulated: int
    findings: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the tables have all settings."""
        return self.tabulated == self.settings and not self.findings


@dataclass(frozen=True)
class FolderStatus:
    """The state of everything in a folder.

    Attributes:
        runs: in the order of their folders, including runs that a sweep has not begun.
        sweeps: in the order of their folders.
    """

    runs: tuple[RunStatus, ...]
    sweeps: tuple[SweepStatus, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every image and table is complete, without other problems."""
        runs = all(run.is_complete for run in self.runs)
        return runs and all(sweep.is_complete for sweep in self.sweeps)


def folder_status(folder: str | Path) -> FolderStatus:
    """The state of all runs and sweeps in a folder; writes nothing.

    Raises:
        ValueError: there is no folder, or neither a run nor a sweep in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    runs = {path: _run_status(path) for path in find_runs(folder)}
    sweeps = []
    for path in sorted(file.parent for file in folder.rglob(SWEEP_FILE)):
        try:
            plan = read_plan(path)
        except (ValueError, OSError) as error:
            sweeps.append(SweepStatus(str(path), 0, 0, (describe_error(error),)))
            continue
        sweeps.append(SweepStatus(str(path), len(plan), count_tabulated(path)))
        for setting in plan:
            run = path / RUNS / setting.folder
            runs.setdefault(run, _not_begun(run, setting))
    if not runs and not sweeps:
        raise ValueError(
            f"`folder` must hold a run ({RUN_FILE}) or a sweep ({SWEEP_FILE}), "
            f"got {str(folder)!r} without one."
        )
    return FolderStatus(tuple(runs[path] for path in sorted(runs)), tuple(sweeps))


def _run_status(path: Path) -> RunStatus:
    """The status of a run; a damaged description is a finding, so that other runs still show."""
    try:
        return run_status(path)
    except (ValueError, OSError) as error:
        return RunStatus(
            str(path), "?", "?", 0, 0, 0, 0, (describe_error(error),), is_running=False
        )


def _not_begun(path: Path, setting: PlannedSetting) -> RunStatus:
    return RunStatus(
        folder=str(path),
        method=setting.method,
        keep_rate=f"{setting.keep_rate:g}",
        total=setting.images,
        done=0,
        missing=setting.images,
        broken=0,
        findings=(),
        is_running=False,
    )
