"""Merging around one self-attention: the only module that reads a model's arguments and outputs.

The attention's class becomes a subclass that overrides `__call__`. That sits outside every
processor, hook and replaced `forward`, so nothing set before or after can displace it; it is one
assignment to undo; and `torch.compile` notices both. Pre-hooks record what an attention is not
told: the token grid (known to its transformer) and its block's input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.partitions import Partition, clusters_to_keep
from sd_tokenmerge.patching.compiled import choose_in_graph, is_in_backward
from sd_tokenmerge.patching.features import head_mean_keys, received_attention
from sd_tokenmerge.patching.reuse import BlockPartitions, PartitionReuse
from sd_tokenmerge.patching.sites import cache_over_steps, only_attends_to_itself

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class GridRecorder:
    """Height and width in tokens of the image that runs through one transformer.

    Attributes:
        grid: of the current run; None while the transformer does not run.
        last_grid: of the latest run.
    """

    grid: Grid | None = None
    last_grid: Grid | None = None

    def begin(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the transformer: its input is an image, `[B, C, H, W]`."""
        image = args[0] if args else kwargs["hidden_states"]
        self.grid = self.last_grid = Grid(image.shape[-2], image.shape[-1])

    def end(self, module: Any, args: Arguments, output: Any) -> None:
        """Forward hook of the transformer."""
        self.grid = None


class MergedBlock:
    """What a merged self-attention knows of its block.

    Attributes:
        path: the block's name.
        partitions: the block's partitions.
        recorder: knows the grid.
        rate: the keep rate in this call of the denoiser.
    """

    def __init__(
        self,
        config: MergeConfig,
        reuse: PartitionReuse,
        partitions: BlockPartitions,
        recorder: GridRecorder,
        keep_rate: KeepRate,
        depth: float,
    ) -> None:
        """Merge in one block.

        Args:
            config: how tokens are merged.
            reuse: decides whether a partition is computed.
            partitions: the block's entry in `reuse.blocks`.
            recorder: of the block's transformer.
            keep_rate: fraction of the tokens that is kept.
            depth: the block's place among the merged blocks, in [0, 1].
        """
        self.config = config
        self.reuse = reuse
        self.partitions = partitions
        self.recorder = recorder
        self.path = partitions.path
        self.keep_rate = keep_rate
        self._depth = depth
        # Dynamo specialises on strings, but makes floats symbolic.
        self._rate = repr(keep_rate.at(0.0, depth))
        self._input: Tensor | None = None
        self._forget_inputs()

    @property
    def rate(self) -> float:
        """The keep rate in this call of the denoiser."""
        return float(self._rate)

    def set_progress(self, progress: float) -> None:
        """Note the progress of the denoising, in [0, 1)."""
        self._rate = repr(self.keep_rate.at(progress, self._depth))

    def record_input(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the block: ToMe-SD and ATC cluster its input, before the norm."""
        self._input = args[0] if args else kwargs["hidden_states"]

    def choose(self, attention: Any, tokens: Tensor) -> Partition | None:
        """The partition of the attention's input `[B, N, C]`; None to keep every token.

        Raises:
            RuntimeError: the block runs outside its transformer, or the attention outside its
                block.
            ValueError: the tokens don't fill the grid, or the method can't reach the keep rate.
        """
        block_input, self._input = self._input, None
        if torch.compiler.is_compiling():
            return self._choose(attention, tokens, block_input)
        if is_in_backward():
            return self._choose_again(attention, tokens, block_input)
        partition = self._choose(attention, tokens, block_input)
        if torch.is_grad_enabled() and block_input is not None:
            self._chosen_for[block_input] = partition
        return partition

    def _choose_again(
        self, attention: Any, tokens: Tensor, block_input: Tensor | None
    ) -> Partition | None:
        """What `choose` chose in the forward pass that gradient checkpointing recomputes.

        Checkpointing of blocks passes the very tensor that the block got then. Checkpointing of
        larger parts recomputes that tensor: only partitions that depend on nothing but the block's
        features and grid can then be computed anew.
        """
        if block_input is not None and block_input in self._chosen_for:
            chosen: Partition | None = self._chosen_for[block_input]
            return chosen
        is_pure = not self.reuse.needs_call and not self.keep_rate.varies_over_steps
        if is_pure and self.recorder.grid is not None:
            return self._choose(attention, tokens, block_input)
        raise RuntimeError(
            f"{self.path} is recomputed during backward from a tensor that it did not get in the "
            "forward pass, so its partition is unknown: use the model's own gradient checkpointing "
            "with use_reentrant=False and without saved-tensor hooks."
        )

    def _choose(
        self, attention: Any, tokens: Tensor, block_input: Tensor | None
    ) -> Partition | None:
        grid = self.recorder.grid
        batch, num_tokens, _ = tokens.shape
        if grid is None:
            raise RuntimeError(f"{self.path} must be run by its transformer.")
        if grid.num_tokens != num_tokens:
            raise ValueError(
                f"the tokens of {self.path} must fill its transformer's "
                f"{grid.height}x{grid.width} grid, got {num_tokens}."
            )
        num_clusters = clusters_to_keep(num_tokens, self.rate)
        if num_clusters == num_tokens:
            return None

        def features() -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                uses_scores = self.reuse.method.uses_scores
                scores = received_attention(attention, tokens) if uses_scores else None
                if self.config.features == "keys":
                    return head_mean_keys(attention, tokens), scores
                if block_input is None:
                    raise RuntimeError(f"{self.path} must run its self-attention itself.")
                return block_input.detach(), scores

        if torch.compiler.is_compiling():
            method, ticket = self.reuse.method, self.partitions.ticket
            return choose_in_graph(method, ticket, grid, num_clusters, features)
        return self.reuse.choose(self.partitions, grid, batch, num_clusters, features)

    def key_bias(self, partition: Partition, tokens: Tensor) -> Tensor | None:
        """What is added to the logits of merged keys, `[B, 1, K]`: log(cluster size), or None."""
        if not self.config.weights_keys:
            return None
        # ToMe (Bolya et al., 2023), "proportional attention": softmax(Q K^T / sqrt(d) + log s)
        return partition.sizes.log().to(tokens.dtype).unsqueeze(1)

    def _forget_inputs(self) -> None:
        """Start without partitions for backward passes, which are kept by the block's input."""
        self._chosen_for = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen no input."""
        state = dict(self.__dict__)
        del state["_chosen_for"]
        return state | {"_input": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_inputs()


class MergedAttention:
    """What `attach` puts in front of an attention's class, under the same name."""

    _merged_block: MergedBlock
    _patch: Any
    _unmerged_class: type

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to clusters instead of to tokens, `[B, N, C] -> [B, N, C]`."""
        block = self._merged_block
        attend: Callable[..., Tensor] = super().__call__  # type: ignore[misc]
        partition = block.choose(self, hidden_states)
        if partition is None:
            return attend(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        _require_plain_call(self, block.config, encoder_hidden_states, attention_mask)

        merged = partition.merge(hidden_states)
        bias = block.key_bias(partition, hidden_states)
        if block.config.merge == "kv":
            return attend(
                hidden_states, encoder_hidden_states=merged, attention_mask=bias, **kwargs
            )
        if block.config.merge == "q":
            return partition.unmerge(attend(merged, encoder_hidden_states=hidden_states, **kwargs))
        return partition.unmerge(attend(merged, attention_mask=bias, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_merged, (self._unmerged_class,), self.__dict__


@cache
def _merged_class(base: Any) -> Any:
    namespace = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (MergedAttention, base), {**namespace, "_unmerged_class": base})


def attach(attention: Any, block: MergedBlock, patch: object) -> None:
    """Make an attention merge; `patch` is what `attached_patch` returns."""
    base: Any = type(attention)
    attention._merged_block = block
    attention._patch = patch
    attention.__class__ = _merged_class(base)


def detach(attention: Any) -> None:
    """Undo `attach`, leaving nothing behind."""
    attention.__class__ = attention._unmerged_class
    del attention._merged_block, attention._patch


def _new_merged(base: type) -> Any:
    cls = _merged_class(base)
    return cls.__new__(cls)


def _require_plain_call(
    attention: Any, config: MergeConfig, keys: Tensor | None, attention_mask: Tensor | None
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
    if config.merge != "qkv" or config.weights_keys:
        reason = only_attends_to_itself(attention)
        if reason is not None:
            raise RuntimeError(f"only plain merge='qkv' can be combined with {reason}.")
    if config.merge != "qkv" and attention.fused_projections:
        raise RuntimeError(
            f"merge={config.merge!r} needs separate projections: call unfuse_qkv_projections()."
        )
