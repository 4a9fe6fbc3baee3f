"""Sums by label, against a loop."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels import segments
from sd_tokenmerge.kernels.segments import Segments, segment_sum
from tests.kernels.token_fields import white_tokens

PATHS = {"in token order": segments._sum_in_token_order, "sorted": segments._sorted_sum}


def labels_of(batch: int, count: int, total: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, total, (batch, count), generator=generator)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_those_of_a_loop_in_token_order(path, dtype, monkeypatch):
    monkeypatch.setattr(segments, "_flat_sum", PATHS[path])
    tokens = white_tokens(3 * 50, 17).view(3, 50, 17).to(dtype)
    labels = labels_of(3, 50, 9)
    expected = torch.zeros(3, 12, 17, dtype=torch.promote_types(dtype, torch.float32))
    for image in range(3):
        for token in range(50):
            expected[image, labels[image, token]] += tokens[image, token]
    found = segment_sum(tokens, labels, 12)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)  # to the last bit, and 0 for the unused


@pytest.mark.parametrize("path", PATHS)
def test_gradients(path, monkeypatch):
    monkeypatch.setattr(segments, "_flat_sum", PATHS[path])
    tokens = white_tokens(2 * 12, 3).view(2, 12, 3).double().requires_grad_()
    labels = labels_of(2, 12, 5)
    assert torch.autograd.gradcheck(lambda t: segment_sum(t, labels, 6), (tokens,))


def test_the_first_place_of_each_segment():
    order, first = segments.sort_by_label(torch.tensor([2, 0, 2, 4, 0]), 6)
    assert order.tolist() == [1, 4, 0, 2, 3]
    assert first.tolist() == [0, 2, 2, 4, 4, 5, 5]


def test_nothing_waits_for_the_device():
    # meta tensors have no values to wait for
    tokens, labels = (
        torch.empty(20, 3, device="meta"),
        torch.zeros(20, dtype=torch.int64).to("meta"),
    )
    assert segments.sort_by_label(labels, 4)[1].shape == (5,)
    with torch.device("meta"):
        assert segments._sorted_sum(tokens, Segments(labels[None], 4)).shape == (4, 3)


def test_what_depends_on_the_labels_is_done_once(monkeypatch):
    calls = []

    def sort_by_label(labels, total):
        calls.append(total)
        return real(labels, total)

    real = segments.sort_by_label
    monkeypatch.setattr(segments, "sort_by_label", sort_by_label)
    monkeypatch.setattr(segments, "_flat_sum", segments._sorted_sum)
    labels = labels_of(3, 50, 9)
    kept = Segments(labels, 9)
    for seed in range(3):
        tokens = white_tokens(3 * 50, 4, seed=seed).view(3, 50, 4)
        assert torch.equal(kept.sum(tokens), Segments(labels, 9).sum(tokens))
    assert len(calls) == 1 + 3
    assert kept.sizes is kept.sizes
    assert kept.rows is kept.rows
