"""Sums that no order can change."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from sd_tokenmerge.kernels.exact import (
    best_by_id,
    best_of_pairs,
    nearest_exact,
    pair_similarities,
    similarity_block,
    unit_vectors,
)
from tests.kernels.token_fields import white_tokens

channels = pytest.mark.parametrize("channels", [1, 2, 3, 16, 64, 65, 320, 1280, 4096])


def unit_pairs(channels: int, count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    unit = unit_vectors(white_tokens(2 * count, channels, seed=channels))
    return unit[:count], unit[count:]


@channels
def test_pairs_and_blocks_agree_to_the_last_bit(channels):
    left, right = unit_pairs(channels)
    pairs = pair_similarities(left, right)
    assert torch.equal(similarity_block(left, right).diagonal(), pairs)
    assert torch.equal(similarity_block(right, left).diagonal(), pairs)
    assert torch.equal(similarity_block(left[7:8], right[3:9])[0, 4:5], pairs[7:8])


@channels
def test_the_order_of_channels_does_not_matter(channels):
    left, right = unit_pairs(channels)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        pair_similarities(left[:, order], right[:, order]), pair_similarities(left, right)
    )


@pytest.mark.parametrize("channels", [1, 2, 16, 320, 4096])
def test_aligned_vectors_do_not_overflow_the_53_bits(channels):
    # all parts at their largest, all of one sign: the largest sums there can be
    value = channels**-0.5 * (1 - 2.0**-27)
    vector = torch.full((1, channels), value, dtype=torch.float64)
    shuffled = vector[:, torch.randperm(channels)]
    assert torch.equal(pair_similarities(vector, vector), similarity_block(shuffled, vector)[0])


@pytest.mark.parametrize("channels", [1, 3, 64, 320])
def test_close_to_the_exact_rational_value(channels):
    left, right = unit_pairs(channels, 5)
    for one, other, found in zip(left, right, pair_similarities(left, right), strict=True):
        exact = sum(
            Fraction(a) * Fraction(b) for a, b in zip(one.tolist(), other.tolist(), strict=True)
        )
        assert abs(Fraction(float(found)) - exact) < Fraction(1, 2**46)


def test_unit_vectors_have_length_one_whatever_the_scale():
    tokens = torch.tensor([[3e38, 4e37], [1e-45, 0], [3e-40, -4e-40], [0, 0], [-1e-3, 2e5]])
    length = unit_vectors(tokens).norm(dim=1)
    torch.testing.assert_close(length, torch.tensor([1, 1, 1, 0, 1], dtype=torch.float64))
    huge = torch.tensor([[1e308, 1e308], [3e-300, 4e-300]], dtype=torch.float64)
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(unit_vectors(huge), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_vectors_are_those_of_the_same_numbers_in_float64(dtype):
    tokens = white_tokens(20, 33).to(dtype)
    expected = torch.nn.functional.normalize(tokens.double(), dim=1)
    torch.testing.assert_close(unit_vectors(tokens), expected, rtol=1e-15, atol=1e-16)


def test_a_unit_vector_depends_on_its_token_only():
    tokens = white_tokens(100, 37)
    assert torch.equal(unit_vectors(tokens)[60:61], unit_vectors(tokens[60:61]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_refuses_what_is_not_finite(bad, dtype):
    tokens = white_tokens(5, 3).to(dtype)
    tokens[2, 1] = bad
    with pytest.raises(ValueError, match="`tokens` must be finite"):
        unit_vectors(tokens)


def test_ties_go_to_the_smallest_xor():
    similarity = torch.tensor([[0.5, 0.5, 0.2, 0.5], [0.1, 0.9, 0.9, 0.3]], dtype=torch.float64)
    rows, columns = torch.tensor([5, 2]), torch.tensor([1, 2, 4, 5])
    # 5^1=4, 5^2=7 (4 is less similar, 5 is itself); of 2's largest, 2 is itself and 4 is left
    assert best_by_id(similarity, rows, columns).tolist() == [1, 4]
    pair_row, pair_column = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 2])
    found = best_of_pairs(similarity[pair_row, pair_column], pair_row, rows, columns[pair_column])
    assert found.tolist() == [1, 4]


def test_nearest_exact_is_the_largest_similarity():
    unit = unit_vectors(white_tokens(70, 5))
    ids = torch.arange(70) * 3
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    assert torch.equal(nearest_exact(unit, ids, unit, ids), ids[similarity.argmax(1)])
