from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sd_tokenmerge.patching import features
from sd_tokenmerge.patching.features import (
    project_keys,
    project_queries,
    received_attention,
)

TOKENS = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))


def make_attention(**options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Attention(query_dim=32, heads=4, dim_head=8, **options).eval().requires_grad_(False)


def received(attention, tokens):
    query, key = project_queries(attention, tokens), project_keys(attention, tokens)
    return received_attention(query, key, attention.scale)


@pytest.mark.parametrize("options", [{}, {"qk_norm": "layer_norm"}], ids=str)
@pytest.mark.parametrize("chunk", [1, 2 * 4 * 30 * 7, 2**24])
def test_received_attention_is_the_mean_of_the_weights(options, chunk, monkeypatch):
    monkeypatch.setattr(features, "_CHUNK_ELEMENTS", chunk)  # 1 row, 7 rows, all rows at a time
    attention = make_attention(**options).double()
    tokens = TOKENS.double()
    got = received(attention, tokens)
    queries = attention.to_q(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
    keys = attention.to_k(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
    if options:
        queries, keys = attention.norm_q(queries), attention.norm_k(keys)
    weights = (queries @ keys.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(got, weights.mean((1, 2)).float())
    torch.testing.assert_close(got.sum(-1), torch.ones(2))


def test_received_attention_in_half_precision():
    attention = make_attention()
    expected = received(attention, TOKENS)
    got = received(copy.deepcopy(attention).bfloat16(), TOKENS.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0)
