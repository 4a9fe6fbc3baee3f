"""Inputs of a method from a self-attention: its keys, and the attention each token receives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK_ELEMENTS = 2**20
"""Attention weights held at once: 4 MiB in float32, and another 4 MiB for their softmax."""
_COMPILED_CHUNK_ELEMENTS = 2**24
"""The limit while compiling, where every chunk becomes a part of the graph."""


def head_mean_keys(attention: Any, tokens: Tensor) -> Tensor:
    """The keys averaged over the heads, which ATC compares, `[B, N, C] -> [B, N, C / heads]`.

    The average of linear maps is a linear map, so this costs 1/heads of `attention.to_k`. If `to_k`
    does more than multiply by its weight (LoRA, quantisation, offloading, ...) or the keys are
    normalised, the keys of all heads are computed and then averaged.

    Args:
        attention: a diffusers `Attention`.
        tokens: its input.
    """
    to_k, heads = attention.to_k, attention.heads
    if attention.norm_k is None and _is_just_its_weight(to_k, tokens):
        weight = to_k.weight.unflatten(0, (heads, -1)).mean(0)
        bias = None if to_k.bias is None else to_k.bias.unflatten(0, (heads, -1)).mean(0)
        return F.linear(tokens, weight, bias)
    keys = to_k(tokens).unflatten(-1, (heads, -1))
    if attention.norm_k is not None:
        keys = attention.norm_k(keys)
    mean: Tensor = keys.mean(-2)
    return mean


def _is_just_its_weight(linear: nn.Module, tokens: Tensor) -> bool:
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter  # quantised weights are subclasses of tensors
        and linear.weight.is_floating_point()
        and "forward" not in linear.__dict__  # accelerate and diffusers put their hooks there
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and linear.weight.device == tokens.device
        and linear.weight.dtype == tokens.dtype
    )


def received_attention(attention: Any, tokens: Tensor) -> Tensor:
    """The attention each token receives, averaged over heads and queries, `[B, N, C] -> [B, N]`.

    The significance score of Token Pooling (Marin et al., 2023), from the attention's own queries
    and keys. Computed for one chunk of queries at a time: the N x N weights never exist at once.

    Args:
        attention: a diffusers `Attention`.
        tokens: its input.

    Returns:
        float32; each row sums to 1.
    """
    queries = attention.to_q(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    keys = attention.to_k(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    if attention.norm_q is not None:
        queries = attention.norm_q(queries)
    if attention.norm_k is not None:
        keys = attention.norm_k(keys)
    queries, keys = queries.float() * attention.scale, keys.float().transpose(-1, -2)
    batch, heads, count, _ = queries.shape
    received = torch.zeros(batch, count, device=tokens.device)
    is_compiling = torch.compiler.is_compiling()
    elements = _COMPILED_CHUNK_ELEMENTS if is_compiling else _CHUNK_ELEMENTS
    for chunk in queries.split(max(elements // (batch * heads * count), 1), dim=2):
        received = received + (chunk @ keys).softmax(-1).sum((1, 2))
    mean: Tensor = received / (heads * count)
    return mean
