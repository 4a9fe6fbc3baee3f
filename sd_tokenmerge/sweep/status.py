"""What is done, missing and broken in a run folder, a sweep folder, or a folder of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_tokenmerge.sampling.description import RUN_FILE
from sd_tokenmerge.sampling.manifest import has_content
from sd_tokenmerge.sampling.status import RunStatus, find_runs, run_status
from sd_tokenmerge.sweep.state import STATE_FILE, PlannedSetting, SweepState


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep besides its images.

    Attributes:
        folder: the sweep's folder.
        settings: how many there are, the unmerged pipeline included.
        measured: how many of them have been measured.
        has_results: whether tables and plots of all settings have been written.
        findings: which of these files are gone or changed.
    """

    folder: str
    settings: int
    measured: int
    has_results: bool
    findings: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to measure or to write."""
        return self.measured == self.settings and self.has_results and not self.findings


@dataclass(frozen=True)
class FolderStatus:
    """The state of everything at or below a folder.

    Attributes:
        runs: in the order of their folders, those that a sweep has not begun included.
        sweeps: in the order of their folders.
    """

    runs: tuple[RunStatus, ...]
    sweeps: tuple[SweepStatus, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every image, measurement and table is there, and nothing is wrong."""
        runs = all(run.is_complete for run in self.runs)
        return runs and all(sweep.is_complete for sweep in self.sweeps)


def folder_status(folder: str | Path) -> FolderStatus:
    """Read everything that runs and sweeps have left in a folder; writes nothing.

    Raises:
        ValueError: there is no folder, neither run nor sweep in it, or a description is damaged.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    runs = {path: run_status(path) for path in find_runs(folder)}
    sweeps = []
    for state_file in sorted(Path(folder).rglob(STATE_FILE)):
        state = SweepState.read(state_file.parent)
        sweeps.append(_sweep_status(state_file.parent, state))
        for setting in state.plan:
            path = state_file.parent / setting.folder
            runs.setdefault(path, _not_begun(path, setting))
    if not runs and not sweeps:
        raise ValueError(
            f"`folder` must hold a run ({RUN_FILE}) or a sweep ({STATE_FILE}), "
            f"got {str(folder)!r} without one."
        )
    return FolderStatus(tuple(runs[path] for path in sorted(runs)), tuple(sweeps))


def _sweep_status(folder: Path, state: SweepState) -> SweepStatus:
    files = state.results.get("files", {})
    changed = [name for name, digest in files.items() if not has_content(folder / name, digest)]
    names = {Path(setting.folder).name for setting in state.plan}
    return SweepStatus(
        folder=str(folder),
        settings=len(names),
        measured=len(names & state.measurements.keys()),
        has_results=bool(state.results.get("key")),
        findings=tuple(f"{name} is gone or was changed" for name in sorted(changed)),
    )


def _not_begun(path: Path, setting: PlannedSetting) -> RunStatus:
    return RunStatus(
        folder=str(path),
        method=setting.method,
        keep_rate=setting.keep_rate,
        total=setting.images,
        done=0,
        missing=setting.images,
        broken=0,
        findings=(),
        is_running=False,
    )
