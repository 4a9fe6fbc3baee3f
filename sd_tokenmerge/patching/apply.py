"""Turning token merging on and off: `apply_patch` and `remove_patch`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sd_tokenmerge.config import MergeConfig, make_config
from sd_tokenmerge.methods.base import Method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.attention import (
    Arguments,
    GridRecorder,
    Keywords,
    MergedAttention,
    MergedBlock,
    attach,
    detach,
)
from sd_tokenmerge.patching.call import CallLog, SchedulerOf
from sd_tokenmerge.patching.compiled import is_in_backward, register
from sd_tokenmerge.patching.report import BlockReport, Report
from sd_tokenmerge.patching.reuse import PartitionReuse
from sd_tokenmerge.patching.sites import (
    cache_over_steps,
    find_denoiser,
    find_sites,
    native_latent_size,
)
from sd_tokenmerge.patching.targets import Target, choose_targets, require_reachable


def apply_patch(
    pipe: Any,
    method: str | Method | MergeConfig | None = None,
    *,
    preset: str | None = None,
    replace: bool = False,
    **options: Any,
) -> PatchHandle:
    """Merge tokens around the self-attentions of a pipeline's UNet.

        apply_patch(pipe)                                           # ATC as in its paper
        apply_patch(pipe, "tome-sd", keep_rate=0.4)
        apply_patch(pipe, preset="fast")
        apply_patch(pipe, preset="fast", keep_rate=Linear(0.5, 0.1))
        apply_patch(pipe, MergeConfig("tome-sd", keep_rate=0.4))

    Works on a UNet before and after `torch.compile`, LoRA, IP-Adapter, offloading and the like, in
    any order. Cross-attention and feed-forward see all tokens. A patched UNet must not be called
    from two threads at a time.

    Args:
        pipe: a pipeline with a UNet (its ControlNet is left alone), a UNet, or a ControlNet. A keep
            rate that changes over the steps needs a pipeline, because its scheduler knows the
            steps.
        method: a method or its string, such as `"atc"` or `"atc:linkage=complete"`, or a whole
            `MergeConfig`; None: the preset's method.
        preset: a name from `PRESETS` that provides the options that are not given: `"paper"` (the
            default; the papers' form), `"balanced"` or `"fast"`.
        replace: whether to replace a patch that is already there.
        options: fields of `MergeConfig`, such as `keep_rate`, `levels`, `merge`, `features`,
            `refresh_every`, `share_layers`, `proportional_attention` and `seed`.

    Returns:
        A handle: `handle.report()`, `handle.remove()`; as a context manager it removes the patch at
        the end of the block.

    Raises:
        TypeError: an argument is unknown or of the wrong type, or `pipe` has no UNet.
        ValueError: an argument is out of range, no block would be merged, or the method can't reach
            the keep rate at the size the UNet was made for (for other sizes, the call of the UNet
            raises it).
        RuntimeError: `pipe` is already patched, or caches the output of its self-attentions.
    """
    if type(replace) is not bool:
        raise TypeError(f"`replace` must be True or False, got {replace!r}.")
    if isinstance(method, MergeConfig):
        if preset is not None or options:
            raise TypeError("a MergeConfig must be the only merging option, got others besides it.")
        config = method
    else:
        config = make_config(method, preset="paper" if preset is None else preset, **options)
    parsed = config.parsed_method
    denoiser = find_denoiser(pipe)
    targets = choose_targets(denoiser, config)
    scheduler = SchedulerOf(pipe)
    if any(rate.varies_over_steps for rate in config.keep_rates) and not scheduler.is_known:
        raise ValueError(
            "`keep_rate` changes over the steps, so `pipe` must be a pipeline, whose scheduler "
            f"knows the steps, got {type(pipe).__name__}."
        )
    native = native_latent_size(denoiser)
    if native is not None:
        require_reachable(parsed, targets, *native)
    for site in (target.site for target in targets):
        cache_name = cache_over_steps(site.attention)
        if cache_name is not None:
            raise RuntimeError(
                f"`pipe` must not cache its self-attentions over steps, got {cache_name!r} on "
                f"{site.path}: it would replay merged tokens under another partition."
            )
    present = find_patch(denoiser)
    if present is not None and not replace:
        raise RuntimeError(
            "`pipe` is already patched. Call remove_patch(pipe) first, or pass replace=True."
        )
    if present is not None:
        present.detach_from(denoiser)
    patch = Patch(config, parsed, denoiser, targets, scheduler)
    patch.attach_to(denoiser, targets)
    return PatchHandle(denoiser, patch)


def remove_patch(pipe: Any) -> None:
    """Undo `apply_patch`: the model is then exactly what it was before.

    Args:
        pipe: the argument of `apply_patch`, or a copy of it.

    Raises:
        TypeError: `pipe` has no UNet.
        RuntimeError: `pipe` is not patched.
    """
    denoiser = find_denoiser(pipe)
    patch = find_patch(denoiser)
    if patch is None:
        raise RuntimeError("`pipe` must be patched to remove a patch, got one that is not.")
    patch.detach_from(denoiser)


def find_patch(denoiser: nn.Module) -> Patch | None:
    """The patch of a denoiser, if it has one."""
    for module in denoiser.modules():
        if isinstance(module, MergedAttention):
            patch: Patch = module._patch
            return patch
    return None


class PatchHandle:
    """A patch in force; as a context manager, until the end of the block."""

    def __init__(self, denoiser: nn.Module, patch: Patch) -> None:
        self._denoiser = denoiser
        self._patch = patch

    def remove(self) -> None:
        """Undo this patch; does nothing if it was removed or replaced before."""
        if find_patch(self._denoiser) is self._patch:
            self._patch.detach_from(self._denoiser)

    def report(self) -> Report:
        """What was merged so far, also after the patch is removed."""
        return self._patch.report()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


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
        self._calls = CallLog(
            scheduler,
            needs_step=config.refresh_every > 1,
            needs_progress=self._varying,
            needs_values=method.uses_seed,
        )
        self._blocks: dict[str, MergedBlock] = {}
        self._hooks: list[RemovableHandle] = []

    def attach_to(self, denoiser: nn.Module, targets: list[Target]) -> None:
        """Put the hooks on; the arguments are those of `__init__`."""
        recorders: dict[nn.Module, GridRecorder] = {}
        for partitions, target in zip(self._reuse.blocks, targets, strict=True):
            site = target.site
            if site.transformer not in recorders:
                recorder = recorders[site.transformer] = GridRecorder()
                self._add_pre_hook(site.transformer, recorder.begin)
                self._hooks.append(site.transformer.register_forward_hook(recorder.end))
            block = MergedBlock(
                self.config,
                self._reuse,
                partitions,
                recorders[site.transformer],
                target.keep_rate,
                target.depth,
            )
            self._blocks[site.path] = block
            self._add_pre_hook(site.block, block.record_input)
            attach(site.attention, block, self)
        # Without need for it, there is no hook on the denoiser: torch.export can't trace it.
        if self._reuse.needs_call or self._varying:
            self._add_pre_hook(denoiser, self._begin_call)
            self._hooks.append(denoiser.register_forward_hook(self._end_call, always_call=True))

    def _add_pre_hook(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_call(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the denoiser; a compiled denoiser runs it outside the graph."""
        if is_in_backward():
            raise RuntimeError(
                "a call of the denoiser can't be recomputed during backward, because its "
                "partitions depend on the denoising step: checkpoint its blocks instead, with "
                "enable_gradient_checkpointing()."
            )
        call = self._calls.begin(args[1] if len(args) > 1 else kwargs["timestep"])
        self._reuse.begin_call(call)
        if call.progress is not None:
            for block in self._blocks.values():
                block.set_progress(call.progress)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end_call(self, module: Any, args: Arguments, output: Any) -> None:
        """Forward hook of the denoiser, also after an error."""
        self._reuse.end_call()

    def detach_from(self, denoiser: nn.Module) -> None:
        """Take everything off again, from the denoiser given to `attach_to` or its copy."""
        for module in denoiser.modules():
            if isinstance(module, MergedAttention):
                detach(module)
        for hook in self._hooks:
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
            tokens_before=count,
            tokens_after=None if count is None else clusters_to_keep(count, block.rate),
            times_computed=block.partitions.times_computed,
            times_reused=block.partitions.times_reused,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is known to compiled graphs as itself."""
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
