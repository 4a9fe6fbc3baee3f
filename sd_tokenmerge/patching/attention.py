"""Merging around one self-attention.

The attention's class becomes a subclass that overrides `__call__`. That sits outside every
processor, hook and replaced `forward`, so nothing set before or after can displace it. One
assignment undoes it, and `torch.compile` notices both changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.patching.block import MergedBlock
from sd_tokenmerge.patching.sites import incompatibility


class MergedAttention:
    """Mixin that `attach` combines with an attention's class, under the name of that class."""

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


def _require_plain_call(
    attention: Any, config: MergeConfig, keys: Tensor | None, attention_mask: Tensor | None
) -> None:
    if keys is not None:
        raise ValueError("a merged self-attention must get no `encoder_hidden_states`, got some.")
    if attention_mask is not None:
        raise ValueError("a merged self-attention must get no `attention_mask`, got one.")
    require_mergeable(attention, config)


def require_mergeable(attention: Any, config: MergeConfig, installed: type | None = None) -> None:
    """Refuse an attention that can't be merged as `config` says; see `incompatibility`.

    Raises:
        RuntimeError: a modification of the attention is incompatible with merging.
    """
    reason = incompatibility(attention, config, installed)
    if reason is not None:
        raise RuntimeError(f"token merging can't be combined with this model as it is: {reason}")
