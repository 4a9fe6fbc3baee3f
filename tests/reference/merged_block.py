"""A transformer block with merged self-attention, the obvious way, image by image."""

from __future__ import annotations

import copy

import torch


def merged_attention(
    attention, tokens, labels, merge="qkv", proportional_attention=False, representatives=None
):
    """Self-attention in float64 over clusters, `[B, N, C] -> [B, N, C]`."""
    attention = copy.deepcopy(attention).double()
    outputs = []
    for number, (image, clusters) in enumerate(zip(tokens.double(), labels, strict=True)):
        members = [torch.nonzero(clusters == k).flatten() for k in range(int(clusters.max()) + 1)]
        merged = torch.stack([image[index].mean(0) for index in members])
        if representatives is not None:
            merged = torch.stack([image[index] for index in representatives[number]])
        sizes = torch.tensor([len(index) for index in members], dtype=torch.float64)
        query_tokens = merged if merge in ("qkv", "q") else image
        key_tokens = merged if merge in ("qkv", "kv") else image

        queries = attention.to_q(query_tokens).unflatten(-1, (attention.heads, -1))
        keys = attention.to_k(key_tokens).unflatten(-1, (attention.heads, -1))
        values = attention.to_v(key_tokens).unflatten(-1, (attention.heads, -1))
        heads = []
        for head in range(attention.heads):
            logits = queries[:, head] @ keys[:, head].T / queries.shape[-1] ** 0.5
            weights = logits.exp()
            if proportional_attention:  # a key counts as often as it has tokens
                weights = weights * sizes
            heads.append(weights / weights.sum(-1, keepdim=True) @ values[:, head])
        output = attention.to_out[0](torch.cat(heads, -1))
        outputs.append(output[clusters] if merge in ("qkv", "q") else output)
    return torch.stack(outputs)


def merged_block(block, tokens, text, labels, merge="qkv", proportional_attention=False):
    """`BasicTransformerBlock` of SD in float64; only the self-attention is merged."""
    block = copy.deepcopy(block).double()
    x, text = tokens.double(), text.double()
    x = x + merged_attention(block.attn1, block.norm1(x), labels, merge, proportional_attention)
    x = x + block.attn2(block.norm2(x), encoder_hidden_states=text)
    return x + block.ff(block.norm3(x))
