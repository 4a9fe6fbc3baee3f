"""A transformer block with merged self-attention, the obvious way."""

from __future__ import annotations

import copy

from tests.reference.attend import attend


def merged_attention(
    attention, tokens, labels, merge="qkv", sizes=False, first_order=False, representatives=None
):
    """Self-attention in float64 over clusters, `[B, N, C] -> [B, N, C]`."""
    attention = copy.deepcopy(attention).double()
    tokens = tokens.double()
    query, key, value = (
        layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    heads = attend(
        query, key, value, labels, merge, sizes, first_order, representatives=representatives
    )
    return attention.to_out[0](heads.transpose(1, 2).flatten(2))


def merged_block(block, tokens, text, labels, merge="qkv", sizes=False, first_order=False):
    """`BasicTransformerBlock` of SD in float64; only the self-attention is merged."""
    block = copy.deepcopy(block).double()
    x, text = tokens.double(), text.double()
    x = x + merged_attention(block.attn1, block.norm1(x), labels, merge, sizes, first_order)
    x = x + block.attn2(block.norm2(x), encoder_hidden_states=text)
    return x + block.ff(block.norm3(x))
