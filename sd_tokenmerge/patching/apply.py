"""Turning token merging on and off: `apply_patch` and `remove_patch`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import nn

from sd_tokenmerge.config import MergeConfig, make_config
from sd_tokenmerge.methods.base import Method
from sd_tokenmerge.patching.attention import require_mergeable
from sd_tokenmerge.patching.call import SchedulerOf
from sd_tokenmerge.patching.installed import installed_processors
from sd_tokenmerge.patching.patch import Patch, find_patch
from sd_tokenmerge.patching.recording import Recording
from sd_tokenmerge.patching.report import Report
from sd_tokenmerge.patching.sites import find_denoiser, native_grid
from sd_tokenmerge.patching.targets import choose_targets, require_reachable


def apply_patch(
    pipe: Any,
    method: str | Method | MergeConfig | None = None,
    *,
    preset: str | None = None,
    replace: bool = False,
    **options: Any,
) -> PatchHandle:
    """Merge tokens around the self-attentions of a pipeline's UNet or transformer.

        apply_patch(pipe)                                           # ATC as in its paper
        apply_patch(pipe, "tome-sd", keep_rate=0.4)
        apply_patch(pipe, preset="near-lossless")
        apply_patch(pipe, preset="fast", keep_rate=Linear(0.5, 0.1))
        apply_patch(pipe, MergeConfig("tome-sd", keep_rate=0.4))

    Works on a UNet before and after `torch.compile`, LoRA, IP-Adapter, offloading and the like, in
    any order. Cross-attention and feed-forward see all tokens. A patched UNet must not be called
    from two threads at a time: one of them gets a `RuntimeError`.

    Args:
        pipe: a pipeline with a UNet or a supported transformer (its ControlNet is left alone), such
            a model, or a ControlNet. A keep rate that changes over the steps needs a pipeline,
            because its scheduler knows the steps.
        method: a method or its string, such as `"atc"` or `"atc:linkage=complete"`, or a whole
            `MergeConfig`; None: the preset's method.
        preset: a name from `PRESETS` that provides the options that are not given: `"paper"` (the
            default; the papers' form), `"near-lossless"`, `"balanced"` or `"fast"`.
        replace: whether to replace a patch that is already there.
        options: fields of `MergeConfig`, such as `keep_rate`, `levels`, `merge`, `features`,
            `refresh_every`, `share_layers`, `proportional_attention`, `first_order` and `seed`.

    Returns:
        A handle: `handle.report()`, `handle.remove()`; as a context manager it removes the patch at
        the end of the block.

    Raises:
        TypeError: an argument is unknown or of the wrong type, or `pipe` has no supported denoiser.
        ValueError: an argument is out of range, no block would be merged, or the method can't reach
            the keep rate at the size the model was made for (for other sizes, the call of the
            model raises it).
        RuntimeError: `pipe` is already patched, or has a modification that is incompatible with
            merging: a cache of self-attentions, another attention backend, self-attention guidance,
            or an attention processor that `merge` does not support.
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
    native = native_grid(denoiser)
    if native is not None:
        require_reachable(parsed, targets, native)
    for target in targets:
        for installed in (None, *installed_processors(pipe, target.site.path)):
            require_mergeable(target.site.attention, config, target.site, installed)
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
        TypeError: `pipe` has no supported denoiser.
        RuntimeError: `pipe` is not patched.
    """
    denoiser = find_denoiser(pipe)
    patch = find_patch(denoiser)
    if patch is None:
        raise RuntimeError("`pipe` must be patched to remove a patch, got one that is not.")
    patch.detach_from(denoiser)


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
        """What was merged so far; also works after the patch is removed."""
        return self._patch.report()

    def record(self) -> AbstractContextManager[Recording]:
        """Keep the partition of each block in each step, to be drawn over the picture.

            with handle.record() as recording:
                image = pipe(prompt).images[0]
            draw_cluster_grid(image, recording).save("clusters.png")

        Also records reused partitions, and compiled denoisers. Takes 4 bytes per token for every
        partition that is computed, and waits for the device at each.

        Returns:
            A context that yields the recording.

        Raises:
            RuntimeError: the patch was removed, or a recording is already under way.
        """
        if find_patch(self._denoiser) is not self._patch:
            raise RuntimeError("a patch must be in force to be recorded, got one that was removed.")
        return self._patch.record(self._denoiser)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()
