"""Attention for training on a CPU, where torch's fused kernel is slow for few and narrow heads."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor


class ImageByImage:
    """Attention one image at a time, so that its scores stay in the processor's cache."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """The output of `attn`, shape `[B, N, C]`."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, -1)
        query = (attn.to_q(hidden_states) * attn.scale).unflatten(-1, heads).transpose(1, 2)
        key = attn.to_k(context).unflatten(-1, heads).transpose(1, 2)
        value = attn.to_v(context).unflatten(-1, heads).transpose(1, 2)
        out = torch.cat(
            [
                (q @ k.transpose(-1, -2)).softmax(-1, dtype=q.dtype) @ v
                for q, k, v in zip(query.split(1), key.split(1), value.split(1), strict=True)
            ]
        )
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
