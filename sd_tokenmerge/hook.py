"""Merging around one self-attention: the only module that reads a model's arguments and outputs.

The attention's class becomes a subclass that overrides `__call__`. That sits outside every
processor, hook and replaced `forward`, so nothing set before or after can displace it; it is one
assignment to undo; and `torch.compile` notices both. Pre-hooks record what an attention is not
told: the token grid (known to its transformer), its block's input, and the timestep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd_tokenmerge.features import head_mean_keys, received_attention
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.partitions import Partition, clusters_to_keep
from sd_tokenmerge.presets import Features, Merge
from sd_tokenmerge.schedule import BlockSchedule, Schedule
from sd_tokenmerge.sites import cache_over_steps, only_attends_to_itself
from sd_tokenmerge.timesteps import TimestepReader

if TYPE_CHECKING:
    from sd_tokenmerge.patch import Patch

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


@dataclass(frozen=True)
class Merging:
    """What is merged, and how; the meaning of each is that of `apply_patch`'s argument."""

    features: Features
    merge: Merge
    proportional_attention: bool


class GridRecorder:
    """Height and width in tokens of what runs through one transformer."""

    grid: Grid | None = None

    def __call__(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the transformer: its input is an image, `[B, C, H, W]`."""
        image = args[0] if args else kwargs["hidden_states"]
        self.grid = Grid(image.shape[-2], image.shape[-1])


class StepRecorder:
    """Tells a schedule and the merged blocks the timestep of each call of the denoiser."""

    def __init__(
        self, schedule: Schedule, mergers: list[BlockMerger], num_train_timesteps: int
    ) -> None:
        """Serve `mergers`, those whose keep rate changes from step to step.

        Args:
            schedule: of the patch.
            mergers: the blocks.
            num_train_timesteps: the timestep of pure noise.
        """
        self.schedule = schedule
        self.mergers = mergers
        self.num_train_timesteps = num_train_timesteps
        self._reader = TimestepReader()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the denoiser, whose second argument is the timestep.

        Its value must be known in every call: a compiled denoiser runs its hooks outside the graph.
        """
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self.schedule.needs_timestep:
            self.schedule.begin_call(timestep)
        if self.mergers:
            noisiest = self._reader.read(timestep)[-1]
            for merger in self.mergers:
                merger.set_progress(1 - noisiest / self.num_train_timesteps)


class BlockMerger:
    """Merges the tokens of one block's self-attention."""

    def __init__(
        self,
        patch: Patch,
        merging: Merging,
        block: BlockSchedule,
        recorder: GridRecorder,
        keep_rate: KeepRate,
        depth: float,
    ) -> None:
        """Merge for one block.

        Args:
            patch: whose block it is.
            merging: what is merged, and how.
            block: one of `patch.schedule.blocks`.
            recorder: of the block's transformer.
            keep_rate: how much it keeps.
            depth: the block's place among the merged ones, in [0, 1].
        """
        self.patch = patch
        self.keep_rate = keep_rate
        self.depth = depth
        # A string: a compiled graph is made for each, where numbers would be generalised.
        self._rate = repr(keep_rate.at(0.0, depth))
        self.merging = merging
        self.schedule = patch.schedule
        self.block = block
        self.recorder = recorder
        self.block_input: Tensor | None = None

    @property
    def rate(self) -> float:
        """The keep rate in this call of the denoiser."""
        return float(self._rate)

    def set_progress(self, progress: float) -> None:
        """Note how far the denoising is, from 0 to 1."""
        self._rate = repr(self.keep_rate.at(progress, self.depth))

    def record_input(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the block: ToMe-SD and ATC cluster its input, before the norm."""
        self.block_input = args[0] if args else kwargs["hidden_states"]

    def partition(self, attention: Any, tokens: Tensor) -> Partition | None:
        """The partition of the attention's input `[B, N, C]`; None where every token is kept."""
        block_input, self.block_input = self.block_input, None
        grid = self.recorder.grid
        batch, num_tokens, _ = tokens.shape
        if grid is None:
            raise RuntimeError(f"{self.block.path} must be run by its transformer.")
        if grid.height * grid.width != num_tokens:
            raise ValueError(
                f"the tokens of {self.block.path} must fill its transformer's "
                f"{grid.height}x{grid.width} grid, got {num_tokens}."
            )
        num_clusters = clusters_to_keep(num_tokens, self.rate)
        if num_clusters == num_tokens:
            return None

        def features() -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                uses_scores = self.schedule.method.uses_scores
                scores = received_attention(attention, tokens) if uses_scores else None
                if self.merging.features == "keys":
                    return head_mean_keys(attention, tokens), scores
                if block_input is None:
                    raise RuntimeError(f"{self.block.path} must run its self-attention itself.")
                return block_input.detach(), scores

        return self.schedule.partition(self.block, grid, batch, num_clusters, features)

    def key_bias(self, partition: Partition, tokens: Tensor) -> Tensor | None:
        """What is added to the logits of merged keys, `[B, 1, K]`: log(cluster size), or None."""
        if not self.merging.proportional_attention:
            return None
        # ToMe (Bolya et al., 2023), "proportional attention": softmax(Q K^T / sqrt(d) + log s)
        return partition.sizes.log().to(tokens.dtype).unsqueeze(1)


class MergedAttention:
    """What `attach` puts in front of an attention's class, under the same name."""

    _merger: BlockMerger
    _unmerged_class: type

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to clusters instead of to tokens, `[B, N, C] -> [B, N, C]`."""
        merger = self._merger
        attend: Callable[..., Tensor] = super().__call__  # type: ignore[misc]
        partition = merger.partition(self, hidden_states)
        if partition is None:
            return attend(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        _refuse(self, merger.merging, encoder_hidden_states, attention_mask)

        merged = partition.merge(hidden_states)
        bias = merger.key_bias(partition, hidden_states)
        if merger.merging.merge == "kv":
            return attend(
                hidden_states, encoder_hidden_states=merged, attention_mask=bias, **kwargs
            )
        if merger.merging.merge == "q":
            return partition.unmerge(attend(merged, encoder_hidden_states=hidden_states, **kwargs))
        return partition.unmerge(attend(merged, attention_mask=bias, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_merged, (self._unmerged_class,), self.__dict__


@cache
def _merged_class(base: Any) -> Any:
    namespace = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (MergedAttention, base), {**namespace, "_unmerged_class": base})


def attach(attention: Any, merger: BlockMerger) -> None:
    """Make an attention merge."""
    base: Any = type(attention)
    attention._merger = merger
    attention.__class__ = _merged_class(base)


def detach(attention: Any) -> None:
    """Undo `attach`, leaving nothing behind."""
    attention.__class__ = attention._unmerged_class
    del attention._merger


def _new_merged(base: type) -> Any:
    cls = _merged_class(base)
    return cls.__new__(cls)


def _refuse(
    attention: Any, merging: Merging, keys: Tensor | None, attention_mask: Tensor | None
) -> None:
    if keys is not None:
        raise ValueError("a merged self-attention must get no `encoder_hidden_states`, got some.")
    if attention_mask is not None:
        raise ValueError("a merged self-attention must get no `attention_mask`, got one.")
    cache_name = cache_over_steps(attention)
    if cache_name is not None:
        raise RuntimeError(
            f"token merging can't be combined with the cache {cache_name!r} on a self-attention: "
            "it would replay merged tokens under another partition. Remove one of the two."
        )
    if merging.merge != "qkv" or merging.proportional_attention:
        reason = only_attends_to_itself(attention)
        if reason is not None:
            raise RuntimeError(f"only plain merge='qkv' can be combined with {reason}.")
    if merging.merge != "qkv" and attention.fused_projections:
        raise RuntimeError(
            f"merge={merging.merge!r} needs separate projections: call unfuse_qkv_projections()."
        )
