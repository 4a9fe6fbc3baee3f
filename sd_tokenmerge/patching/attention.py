"""Merging around one self-attention.

The attention's class becomes a subclass that overrides `__call__`. That sits outside every
processor, hook and replaced `forward`, so nothing set before or after can displace it. One
assignment undoes it, and `torch.compile` notices both changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sd_tokenmerge.attend import attend
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.patching.block import MergedBlock, SelfAttentionInputs
from sd_tokenmerge.patching.features import project_keys, project_queries
from sd_tokenmerge.patching.interception import Interception
from sd_tokenmerge.patching.sites import incompatibility


class MergedAttention:
    """Mixin that `attach` combines with an attention's class, under the name of that class."""

    _merged_block: MergedBlock
    _patch: Any
    _unmerged_class: type
    scale: float

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to clusters instead of to tokens, `[B, N, C] -> [B, N, C]`."""
        block = self._merged_block
        run: Callable[..., Tensor] = partial(super().__call__, **kwargs)  # type: ignore[misc]
        require_mergeable(self, block.config)
        if block.config.merge != "qkv":
            outputs: list[Tensor] = []

            def attend_to_clusters(*arguments: Any, **options: Any) -> Tensor:
                outputs.append(_attend(block, *arguments, **options))
                return outputs[-1]

            with Interception(attend_to_clusters):
                output = run(hidden_states, encoder_hidden_states, attention_mask)
            if len(outputs) != 1:
                raise RuntimeError(
                    "a merged self-attention must call torch's scaled_dot_product_attention once, "
                    f"but its processor called it {len(outputs)} times: call "
                    "unet.set_attn_processor(AttnProcessor2_0()), or undo what replaced that "
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
            return run(hidden_states, encoder_hidden_states, attention_mask)
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "a merged self-attention must get neither `encoder_hidden_states` nor "
                "`attention_mask`, got one of them."
            )
        merged, bias = partition.merge(hidden_states), None
        if block.config.weights_keys:
            # ToMe (Bolya et al., 2023), "proportional attention": softmax(Q K^T / sqrt(d) + log s)
            bias = partition.log_sizes(merged.dtype).unsqueeze(1)
        return partition.unmerge(run(merged, attention_mask=bias))

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
    inputs = SelfAttentionInputs(
        query.shape[0],
        query.shape[2],
        query=lambda: query,
        key=lambda: key,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    partition = block.choose(inputs)
    if partition is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, scale=scale, **options
        )
    if key.shape != query.shape or attn_mask is not None or any(options.values()):
        raise ValueError(
            "a merged self-attention must attend to its own tokens, without a mask or dropout, "
            f"got queries {list(query.shape)}, keys {list(key.shape)} and "
            f"{'a' if attn_mask is not None else 'no'} mask."
        )
    return attend(
        query,
        key,
        value,
        partition,
        merge=block.config.merge,
        sizes=block.config.weights_keys,
        first_order=block.corrects_to_first_order,
        scale=scale,
    )


def require_mergeable(attention: Any, config: MergeConfig) -> None:
    """Refuse an attention that can't be merged as `config` says.

    Raises:
        RuntimeError: a modification of the attention is incompatible with merging.
    """
    reason = incompatibility(attention, config)
    if reason is not None:
        raise RuntimeError(f"token merging can't be combined with this model as it is: {reason}")
