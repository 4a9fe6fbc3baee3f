"""A patch: the hooks that token merging puts on a denoiser, and the report of what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sd_tokenmerge.hook import (
    BlockMerger,
    GridRecorder,
    MergedAttention,
    Merging,
    StepRecorder,
    attach,
    detach,
)
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.schedule import BlockSchedule, Schedule
from sd_tokenmerge.sites import Site


@dataclass(frozen=True)
class BlockReport:
    """What happened at one self-attention.

    Attributes:
        block: the block's name in the UNet.
        level: 0 is the finest resolution.
        merged: whether the patch merges here.
        grid: height and width in tokens in the last call; None before it, and where not merged.
        tokens_before: N in the last call.
        tokens_after: K in the last call.
        times_computed: how many partitions were computed for this block.
        times_reused: how often an earlier one, or another block's, was used.
    """

    block: str
    level: int
    merged: bool
    grid: Grid | None = None
    tokens_before: int | None = None
    tokens_after: int | None = None
    times_computed: int = 0
    times_reused: int = 0


@dataclass(frozen=True)
class Report:
    """What a patch merged so far; `str(report)` is a table.

    Attributes:
        title: the patch's settings in words.
        rows: one for each self-attention of the UNet, merged or not, in the order they run.
    """

    title: str
    rows: tuple[BlockReport, ...]

    def __str__(self) -> str:
        width = max(len(row.block) for row in self.rows)
        lines = [
            f"{sum(row.merged for row in self.rows)} of {len(self.rows)} self-attention blocks "
            f"merged: {self.title}",
            f"{'block':{width}}  level  grid     tokens          computed  reused",
        ]
        for row in self.rows:
            grid = f"{row.grid.height}x{row.grid.width}" if row.grid else "-"
            tokens = f"{row.tokens_before} -> {row.tokens_after}" if row.grid else "-"
            line = f"{row.block:{width}}  {row.level:5}  "
            if row.merged:
                line += f"{grid:7}  {tokens:14}  {row.times_computed:8}  {row.times_reused:6}"
            else:
                line += "not merged"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True)
class MergedSite:
    """A self-attention to be merged, and how much.

    Attributes:
        site: where it is.
        keep_rate: how much it keeps.
        depth: its place among the blocks that `keep_rate` is spread over, in [0, 1].
    """

    site: Site
    keep_rate: KeepRate
    depth: float


class Patch:
    """Everything a patch adds to a denoiser. Holds no modules: it is copied along with them."""

    def __init__(
        self,
        method: Method,
        merging: Merging,
        refresh_every: int,
        share_layers: bool,
        seed: int,
        sites: list[Site],
        merged: list[MergedSite],
        num_train_timesteps: int,
    ) -> None:
        self.merging = merging
        self.num_train_timesteps = num_train_timesteps
        self.title = f"{method}, keep rate {_keep_rate_text(merged)}, " + ", ".join(
            [
                f"features {merging.features}",
                f"merge {merging.merge}",
                *(["proportional attention"] if merging.proportional_attention else []),
                f"refreshed every {refresh_every} steps" if refresh_every > 1 else "always fresh",
                *(["shared by the blocks of a level"] if share_layers else []),
            ]
        )
        self.places = [(site.path, site.level) for site in sites]
        first: dict[int, int] = {}
        for index, one in enumerate(merged):
            first.setdefault(one.site.level, index)
        self.schedule = Schedule(
            method,
            seed,
            refresh_every,
            [one.site.path for one in merged],
            [
                first[one.site.level] if share_layers and first[one.site.level] != index else None
                for index, one in enumerate(merged)
            ],
        )
        self.mergers: dict[str, BlockMerger] = {}
        self.hooks: list[RemovableHandle] = []

    def attach_to(self, denoiser: nn.Module, merged: list[MergedSite]) -> None:
        """Put the hooks on; `merged` are the sites given to `__init__`."""

        def add_hook(module: nn.Module, hook: Any) -> None:
            self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        recorders: dict[nn.Module, GridRecorder] = {}
        for one, block in zip(merged, self.schedule.blocks, strict=True):
            site = one.site
            if site.transformer not in recorders:
                recorders[site.transformer] = GridRecorder()
                add_hook(site.transformer, recorders[site.transformer])
            recorder = recorders[site.transformer]
            merger = BlockMerger(self, self.merging, block, recorder, one.keep_rate, one.depth)
            self.mergers[site.path] = merger
            if self.merging.features == "input":
                add_hook(site.block, merger.record_input)
            attach(site.attention, merger)
        varying = [m for m in self.mergers.values() if m.keep_rate.varies_over_steps]
        if self.schedule.needs_timestep or varying:
            add_hook(denoiser, StepRecorder(self.schedule, varying, self.num_train_timesteps))

    def detach_from(self, denoiser: nn.Module) -> None:
        """Take everything off again, from the denoiser given to `attach_to` or its copy."""
        for module in denoiser.modules():
            if isinstance(module, MergedAttention):
                detach(module)
        for hook in self.hooks:
            hook.remove()

    def report(self) -> Report:
        """What was merged so far."""
        merged = {block.path: block for block in self.schedule.blocks}
        return Report(self.title, tuple(self._row(*place, merged) for place in self.places))

    def _row(self, path: str, level: int, merged: dict[str, BlockSchedule]) -> BlockReport:
        if path not in merged:
            return BlockReport(path, level, merged=False)
        merger = self.mergers[path]
        grid = merger.recorder.grid
        count = None if grid is None else grid.num_tokens
        return BlockReport(
            path,
            level,
            merged=True,
            grid=grid,
            tokens_before=count,
            tokens_after=None if count is None else clusters_to_keep(count, merger.rate),
            times_computed=merged[path].times_computed,
            times_reused=merged[path].times_reused,
        )


def _keep_rate_text(merged: list[MergedSite]) -> str:
    by_level = {one.site.level: str(one.keep_rate) for one in merged}
    if len(set(by_level.values())) == 1:
        return next(iter(by_level.values()))
    return " and ".join(f"{text} at level {level}" for level, text in sorted(by_level.items()))


def find_patch(denoiser: nn.Module) -> Patch | None:
    """The patch of a denoiser, if it has one."""
    for module in denoiser.modules():
        if isinstance(module, MergedAttention):
            return module._merger.patch
    return None
