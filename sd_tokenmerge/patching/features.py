"""What methods read from a self-attention: its keys, and the attention each token receives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**20
"""Attention weights held at once: 4 MiB in float32, and another 4 MiB for their softmax."""
_COMPILED_CHUNK_ELEMENTS = 2**24
"""The limit while compiling, where every chunk becomes a part of the graph."""


def project_queries(attention: Any, tokens: Tensor) -> Tensor:
    """The queries of a diffusers `Attention`, `[B, N, C] -> [B, H, N, D]`."""
    queries: Tensor = attention.to_q(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return queries if attention.norm_q is None else attention.norm_q(queries)


def project_keys(attention: Any, tokens: Tensor) -> Tensor:
    """The keys of a diffusers `Attention`, `[B, N, C] -> [B, H, N, D]`."""
    keys: Tensor = attention.to_k(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return keys if attention.norm_k is None else attention.norm_k(keys)


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The attention each token receives, averaged over heads and queries, `[B, N]`.

    The significance score of Token Pooling (Marin et al., 2023), from the attention's own queries
    and keys. Computed for one chunk of queries at a time: the N x N weights never exist at once.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        scale: factor on their products.

    Returns:
        float32; each row sums to 1.
    """
    queries, keys = query.float() * scale, key.float().transpose(-1, -2)
    batch, heads, count, _ = queries.shape
    received = torch.zeros(batch, count, device=query.device)
    is_compiling = torch.compiler.is_compiling()
    elements = _COMPILED_CHUNK_ELEMENTS if is_compiling else _CHUNK_ELEMENTS
    for chunk in torch.split(queries, max(elements // (batch * heads * count), 1), 2):
        received = received + (chunk @ keys).softmax(-1).sum((1, 2))
    mean: Tensor = received / (heads * count)
    return mean
