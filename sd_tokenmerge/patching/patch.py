"""A patch: the hooks and merged attentions that it adds to a denoiser, and their removal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods.base import Method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.attention import MergedAttention, attach, detach
from sd_tokenmerge.patching.block import (
    Arguments,
    DenoiserGridRecorder,
    GridRecorder,
    Keywords,
    MergedBlock,
    read_image_grid,
)
from sd_tokenmerge.patching.call import CallLog, SchedulerOf
from sd_tokenmerge.patching.compiled import is_in_backward, register
from sd_tokenmerge.patching.families import find_family
from sd_tokenmerge.patching.recording import Recording
from sd_tokenmerge.patching.report import BlockReport, Report
from sd_tokenmerge.patching.reuse import PartitionReuse
from sd_tokenmerge.patching.sites import find_sites
from sd_tokenmerge.patching.targets import Target


class Patch:
    """Everything a patch adds to a denoiser. Holds no modules: it is copied along with them."""

    def __init__(
        self,
        config: MergeConfig,
        method: Method,
        denoiser: nn.Module,
        targets: list[Target],
        scheduler: SchedulerOf,
    ) -> None:
        """Prepare what `attach_to` attaches.

        Args:
            config: how tokens are merged.
            method: `config.parsed_method`.
            denoiser: the UNet or ControlNet.
            targets: the self-attentions to merge.
            scheduler: of the pipeline.
        """
        self.config = config
        self._places = [(site.path, site.level) for site in find_sites(denoiser)]
        self._reuse = PartitionReuse(
            method,
            config.seed,
            config.refresh_every,
            [target.site.path for target in targets],
            _sources(targets, config.share_layers),
        )
        register(self._reuse)
        self._varying = any(rate.varies_over_steps for rate in config.keep_rates)
        family = find_family(denoiser)
        self._timestep_place = 1 if family is None else family.timestep
        self._calls = CallLog(
            scheduler,
            scheduler_timestep=None if family is None else family.clock.to_scheduler,
            needs_step=config.refresh_every > 1,
            needs_progress=self._varying,
            needs_values=method.uses_seed,
        )
        self._blocks: dict[str, MergedBlock] = {}
        self._hooks: list[RemovableHandle] = []

    def attach_to(self, denoiser: nn.Module, targets: list[Target]) -> None:
        """Attach the hooks; the arguments are those of `__init__`."""
        family = find_family(denoiser)
        recorders: dict[nn.Module, GridRecorder] = {}
        for partitions, target in zip(self._reuse.blocks, targets, strict=True):
            site = target.site
            if site.transformer not in recorders:
                recorder = recorders[site.transformer] = (
                    GridRecorder(read_image_grid)
                    if family is None
                    else DenoiserGridRecorder(family.grid)
                )
                self._add_pre_hook(site.transformer, recorder.begin)
                self._hooks.append(site.transformer.register_forward_hook(recorder.end))
            block = MergedBlock(
                self.config,
                self._reuse,
                partitions,
                recorders[site.transformer],
                target.keep_rate,
                target.depth,
                site,
            )
            self._blocks[site.path] = block
            self._add_pre_hook(site.block, block.record_input)
            attach(site.attention, block, self)
        # The denoiser gets hooks only if they are needed: torch.export can't trace them.
        if self._reuse.needs_call or self._varying:
            self._add_pre_hook(denoiser, self._begin_call)
            self._hooks.append(denoiser.register_forward_hook(self._end_call, always_call=True))

    def _add_pre_hook(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_call(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the denoiser; a compiled denoiser runs it outside the graph."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.export can't be combined with merging that depends on the denoising step: "
                "use refresh_every=1, share_layers=False, a method without randomness, and a keep "
                "rate that is the same in every step."
            )
        if is_in_backward():
            raise RuntimeError(
                "a call of the denoiser can't be recomputed during backward, because its "
                "partitions depend on the denoising step: checkpoint its blocks instead, with "
                "enable_gradient_checkpointing()."
            )
        place = self._timestep_place
        call = self._calls.begin(args[place] if len(args) > place else kwargs["timestep"])
        self._reuse.begin_call(call)
        if call.progress is not None:
            for block in self._blocks.values():
                block.set_progress(call.progress)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_call(self, module: Any, args: Arguments, output: Any) -> None:
        """Forward hook of the denoiser, also after an error."""
        self._reuse.end_call()
        if output is not None:  # None: the call failed, and its error is on the way
            self._reuse.thread.require()

    def detach_from(self, denoiser: nn.Module) -> None:
        """Remove everything from the denoiser given to `attach_to`, or from its copy."""
        for module in denoiser.modules():
            if isinstance(module, MergedAttention):
                detach(module)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def record(self, denoiser: nn.Module) -> Iterator[Recording]:
        """Keep the partitions that are used until the end of the block.

        Args:
            denoiser: the one given to `attach_to`.

        Raises:
            RuntimeError: a recording is already under way.
        """
        if self._reuse.observer is not None:
            raise RuntimeError("a recording is already under way: only one is possible at a time.")
        recording = Recording(tuple(self._blocks), self._timestep_place)
        hook = denoiser.register_forward_pre_hook(recording.begin_step, with_kwargs=True)
        self._reuse.observer = recording.add
        try:
            yield recording
        finally:
            self._reuse.observer = None
            hook.remove()

    def report(self) -> Report:
        """What was merged so far."""
        return Report(str(self.config), tuple(self._row(*place) for place in self._places))

    def _row(self, path: str, level: int) -> BlockReport:
        if path not in self._blocks:
            return BlockReport(path, level, merged=False)
        block = self._blocks[path]
        grid = block.recorder.last_grid
        count = None if grid is None else grid.num_tokens
        return BlockReport(
            path,
            level,
            merged=True,
            grid=grid,
            text_tokens=block.text_tokens,
            tokens_before=count,
            tokens_after=None if count is None else clusters_to_keep(count, block.rate),
            times_computed=block.partitions.times_computed,
            times_reused=block.partitions.times_reused,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy registers itself for compiled graphs."""
        self.__dict__.update(state)
        self._reuse.forget()
        register(self._reuse)


def _sources(targets: list[Target], share_layers: bool) -> list[int | None]:
    """For each target, the index of the first target of its level if that provides partitions."""
    first: dict[int, int] = {}
    sources: list[int | None] = []
    for index, target in enumerate(targets):
        provider = first.setdefault(target.site.level, index)
        sources.append(provider if share_layers and provider != index else None)
    return sources


def find_patch(denoiser: nn.Module) -> Patch | None:
    """The patch of a denoiser, if it has one."""
    for module in denoiser.modules():
        if isinstance(module, MergedAttention):
            patch: Patch = module._patch
            return patch
    return None
