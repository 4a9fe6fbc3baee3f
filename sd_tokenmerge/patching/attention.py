"""Merging around one self-attention.

The attention's class becomes a subclass that overrides `__call__`. That sits outside every
processor, hook and replaced `forward`, so nothing set before or after can displace it. One
assignment undoes it, and `torch.compile` notices both changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sd_tokenmerge.attend import attend
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.patching.block import MergedBlock, SelfAttentionInputs
from sd_tokenmerge.patching.features import project_keys, project_queries
from sd_tokenmerge.patching.interception import Interception
from sd_tokenmerge.patching.sites import Site, incompatibility


class MergedAttention:
    """Mixin that `attach` combines with an attention's class, under the name of that class."""

    _merged_block: MergedBlock
    _patch: Any
    _unmerged_class: type
    scale: float

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend to clusters instead of to tokens, `[B, N, C] -> [B, N, C]`."""
        block = self._merged_block
        run: Callable[..., Any] = super().__call__  # type: ignore[misc]
        require_mergeable(self, block.config, block)
        if block.config.merge != "qkv" or not block.merges_input:
            outputs: list[Tensor] = []

            def attend_to_clusters(*arguments: Any, **options: Any) -> Tensor:
                outputs.append(_attend(block, *arguments, **options))
                return outputs[-1]

            with Interception(attend_to_clusters):
                output = run(hidden_states, *args, **kwargs)
            if len(outputs) != 1:
                raise RuntimeError(
                    "a merged self-attention must call torch's scaled_dot_product_attention once, "
                    f"but its processor called it {len(outputs)} times: call "
                    f"set_attn_processor({block.processors[0]}()), or undo what replaced that "
                    "function."
                )
            return output
        batch, num_tokens, _ = hidden_states.shape
        inputs = SelfAttentionInputs(
            batch,
            num_tokens,
            query=partial(project_queries, self, hidden_states),
            key=partial(project_keys, self, hidden_states),
            scale=self.scale,
        )
        partition = block.choose(inputs)
        if partition is None:
            return run(hidden_states, *args, **kwargs)
        keys, mask = (
            kwargs.pop(name, None) for name in ("encoder_hidden_states", "attention_mask")
        )
        if args or keys is not None or mask is not None:
            raise ValueError(
                "a merged self-attention must get neither `encoder_hidden_states` nor "
                "`attention_mask`, got one of them."
            )
        merged, bias = partition.merge(hidden_states), None
        if block.config.weights_keys:
            # ToMe (Bolya et al., 2023), "proportional attention": softmax(Q K^T / sqrt(d) + log s)
            bias = partition.log_sizes(merged.dtype).unsqueeze(1)
        return partition.unmerge(run(merged, attention_mask=bias, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_merged, (self._unmerged_class,), self.__dict__


@cache
def _merged_class(base: Any) -> Any:
    namespace = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (MergedAttention, base), {**namespace, "_unmerged_class": base})


def attach(attention: Any, block: MergedBlock, patch: object) -> None:
    """Make an attention merge; `find_patch` finds `patch` there."""
    base: Any = type(attention)
    attention._merged_block = block
    attention._patch = patch
    attention.__class__ = _merged_class(base)


def detach(attention: Any) -> None:
    """Undo `attach` completely."""
    attention.__class__ = attention._unmerged_class
    del attention._merged_block, attention._patch


def _new_merged(base: type) -> Any:
    cls = _merged_class(base)
    return cls.__new__(cls)


def _attend(
    block: MergedBlock,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Merged attention in place of a processor's `scaled_dot_product_attention`."""
    length = query.shape[2]
    image = block.image_tokens(length)
    block.text_tokens = length - (image.stop - image.start)
    is_key_mask = attn_mask is None or (
        block.has_text and attn_mask.ndim == 4 and attn_mask.shape[1:] == (1, 1, length)
    )
    shifts = None
    if block.ends_with_padding and attn_mask is not None and is_key_mask:
        shifts = attn_mask.logical_not().sum(-1).flatten()
    padding_first = partial(_rotate, shifts=shifts)
    inputs = SelfAttentionInputs(
        query.shape[0],
        image.stop - image.start,
        query=lambda: padding_first(query)[:, :, image],
        key=lambda: padding_first(key)[:, :, image],
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        padding_first=padding_first,
    )
    partition = block.choose(inputs)
    if partition is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, scale=scale, **options
        )
    if key.shape != query.shape or not is_key_mask or any(options.values()):
        raise ValueError(
            "a merged self-attention must attend to its own tokens, without dropout and with no "
            f"mask but one of text tokens, got queries {list(query.shape)}, keys "
            f"{list(key.shape)} and "
            f"{'no mask' if attn_mask is None else f'a mask {list(attn_mask.shape)}'}."
        )
    if attn_mask is not None:
        attn_mask = padding_first(attn_mask.mT).mT
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
    # A block that is recomputed in backward has no grid; its partition tells how many they are.
    image = block.image_tokens(length, partition.labels.shape[1])
    output = attend(
        padding_first(query),
        padding_first(key),
        padding_first(value),
        partition.with_singletons(image.start, length - image.stop),
        merge=block.config.merge,
        sizes=block.config.weights_keys,
        first_order=block.corrects_to_first_order,
        scale=scale,
        key_bias=attn_mask,
    )
    return output if shifts is None else _rotate(output, -shifts)


def _rotate(tokens: Tensor, shifts: Tensor | None) -> Tensor:
    """Move each sequence's tokens towards its end, and those beyond the end to the beginning.

    Args:
        tokens: `[B, ..., N, C]`.
        shifts: by how many tokens, `[B]`; None: by none.
    """
    if shifts is None:
        return tokens
    length = tokens.shape[-2]
    sources = (torch.arange(length, device=tokens.device) - shifts[:, None]) % length
    shape = (len(shifts), *[1] * (tokens.ndim - 3), length, 1)
    return tokens.take_along_dim(sources.view(shape), -2)


def require_mergeable(
    attention: Any,
    config: MergeConfig,
    place: Site | MergedBlock,
    installed: type | None = None,
) -> None:
    """Refuse an attention that can't be merged as `config` says.

    Args:
        attention: the attention.
        config: how tokens are merged.
        place: where it is.
        installed: the class of a processor that the pipeline will install; None: the attention's.

    Raises:
        RuntimeError: a modification of the attention is incompatible with merging.
    """
    reason = incompatibility(attention, config, place.processors, place.merges_input, installed)
    if reason is not None:
        raise RuntimeError(f"token merging can't be combined with this model as it is: {reason}")
