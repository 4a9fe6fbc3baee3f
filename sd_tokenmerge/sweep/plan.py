"""Plan a sweep before anything is loaded: check every setting, count images, estimate the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.patching.outline import Outline, load_outline
from sd_tokenmerge.patching.targets import choose_targets, require_reachable
from sd_tokenmerge.sampling.description import (
    DescriptionError,
    content_differences,
    describe_run,
    option_differences,
    read_description,
)
from sd_tokenmerge.sampling.folder import check_folder
from sd_tokenmerge.sampling.manifest import load_manifest, manifest_files
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob, plan_images
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.status import run_status
from sd_tokenmerge.sweep.folder import PlannedSetting, require_sweep_folder
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.settings import Setting, make_settings


@dataclass(frozen=True)
class PlannedRun:
    """One setting and the state of its run folder.

    Attributes:
        setting: method, keep rate and run folder.
        num_images: images of the run.
        num_done: how many of them have been generated.
        seconds_per_image: median over the recorded images; None if there are none.
        is_replaced: whether the folder holds a run with other options, which will be deleted.
    """

    setting: Setting
    num_images: int
    num_done: int
    seconds_per_image: float | None = None
    is_replaced: bool = False

    @property
    def num_missing(self) -> int:
        """Images to be generated."""
        return self.num_images - self.num_done

    @property
    def planned(self) -> PlannedSetting:
        """Its entry in `sweep.json`."""
        one = self.setting
        return PlannedSetting(one.folder.name, one.method, one.keep_rate, self.num_images)


@dataclass(frozen=True)
class SweepPlan:
    """All settings of a sweep.

    Attributes:
        options: of the unmerged pipeline; size, steps and guidance are the same in all runs.
        runs: one per setting, the unmerged pipeline first.
        skipped: a sentence for each keep rate that its method cannot reach.
    """

    options: ResolvedOptions
    runs: tuple[PlannedRun, ...]
    skipped: tuple[str, ...] = ()

    @property
    def num_missing(self) -> int:
        """Images to be generated in all runs."""
        return sum(run.num_missing for run in self.runs)

    def seconds_left(self, run: PlannedRun) -> float | None:
        """Estimated time to generate a run's missing images.

        From the run's own images, or from the median of the other runs if it has none; None if the
        sweep has none. Loading and measuring are not counted.
        """
        known = [r.seconds_per_image for r in self.runs if r.seconds_per_image is not None]
        if run.seconds_per_image is not None:
            return run.num_missing * run.seconds_per_image
        return run.num_missing * median(known) if known else None

    @property
    def total_seconds_left(self) -> float | None:
        """Estimated time to generate all missing images in one process."""
        parts = [self.seconds_left(run) for run in self.runs]
        return None if None in parts else sum(part for part in parts if part is not None)


def plan_sweep(options: SweepOptions, *, overwrite: bool = False) -> SweepPlan:
    """Check all settings and count the images that exist; writes nothing.

    Args:
        options: of the sweep.
        overwrite: whether runs with other options will be replaced.

    Raises:
        ValueError: an option is invalid, a method cannot reach a keep rate (without
            `skip_unreachable`), or a folder holds something else.
        OSError: a folder cannot be used.
    """
    require_sweep_folder(Path(options.out))
    settings = make_settings(options)
    resolved = resolve_options(settings[0].options)
    outline = _outline(resolved)
    skipped = {} if outline is None else _find_unreachable(settings[1:], outline, resolved)
    if skipped and not options.skip_unreachable:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{name}: {reason} (`skip_unreachable` leaves it out of the table.)")
    kept = [setting for setting in settings if str(setting) not in skipped]
    jobs = plan_images(resolved)
    runs = tuple(_plan_run(setting, jobs, overwrite) for setting in kept)
    notes = tuple(f"{name} is left out: {reason}" for name, reason in skipped.items())
    return SweepPlan(resolved, runs, notes)


def _outline(options: ResolvedOptions) -> Outline | None:
    """The denoiser without weights; None for a single-file checkpoint without a configuration."""
    model = options.model
    if Path(model).is_file():
        if options.model_config is None:
            return None
        model = options.model_config
    return load_outline(model, revision=options.revision, local_files_only=options.local_files_only)


def _find_unreachable(
    settings: Sequence[Setting], outline: Outline, resolved: ResolvedOptions
) -> dict[str, str]:
    """The reason for each setting whose method cannot reach the keep rate."""
    scale = outline.pixels_per_token
    grid = Grid(resolved.height // scale, resolved.width // scale)
    unreachable = {}
    for setting in settings:
        config = setting.options.merging or MergeConfig()
        targets = choose_targets(outline.denoiser, config)
        try:
            require_reachable(config.parsed_method, targets, grid)
        except ValueError as error:
            unreachable[str(setting)] = str(error)
    return unreachable


def _plan_run(setting: Setting, jobs: list[ImageJob], overwrite: bool) -> PlannedRun:
    folder = setting.folder
    resolved = resolve_options(setting.options)
    check_folder(folder, resolved, overwrite)
    try:
        description = read_description(folder)
    except DescriptionError:
        if not overwrite:
            raise
        return PlannedRun(setting, len(jobs), 0, is_replaced=True)
    if description is None:
        return PlannedRun(setting, len(jobs), 0)
    if overwrite and (
        option_differences(description, resolved)
        or content_differences(description, describe_run(resolved, jobs))
    ):
        return PlannedRun(setting, len(jobs), 0, is_replaced=True)
    records = load_manifest(manifest_files(folder)).records
    seconds = median(record.seconds for record in records) if records else None
    done = run_status(folder, hash_all=False).done
    return PlannedRun(setting, len(jobs), done, seconds)
