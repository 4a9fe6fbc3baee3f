"""Sums by label, against a loop."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels import segments
from sd_tokenmerge.kernels.segments import Segments, segment_sum
from sd_tokenmerge.partitions import Partition
from tests.kernels.token_fields import white_tokens
from tests.mps_operators import MissingOnMPS

PATHS = {
    "cpu": segments._sum_in_token_order,
    "cuda": segments._sum_sorted,
    "other devices": segments._sum_by_scan,
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setattr(segments, "_flat_sum", PATHS[request.param])
    return request.param


def labels_of(batch: int, count: int, total: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, total, (batch, count), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_those_of_a_loop(path, dtype):
    tokens = white_tokens(3 * 50, 17).view(3, 50, 17).to(dtype)
    labels = labels_of(3, 50, 9)
    expected = torch.zeros(3, 12, 17, dtype=torch.promote_types(dtype, torch.float32))
    for image in range(3):
        for token in range(50):
            expected[image, labels[image, token]] += tokens[image, token]
    found = segment_sum(tokens, labels, 12)
    assert found.dtype == expected.dtype
    if path == "other devices":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found[:, 9:] == 0).all()
    else:
        assert torch.equal(found, expected)  # to the last bit, and 0 for the unused


@pytest.mark.parametrize("total", [1, 7, 8192])
def test_sums_of_many_tokens_with_a_large_mean_are_exact_to_rounding(total):
    tokens = 1000 + white_tokens(2 * 16384, 3).view(2, 16384, 3)
    labels = labels_of(2, 16384, total)
    exact = segment_sum(tokens.double(), labels, total)
    found = segments._sum_by_scan(tokens.flatten(0, 1), Segments(labels, total)).view_as(exact)
    rounding = torch.finfo(torch.float32).eps
    assert ((found - exact).abs() <= 2 * rounding * exact.abs()).all()


def test_a_segment_does_not_see_the_others(path):
    tokens = white_tokens(40, 3)[None].clone()
    labels = labels_of(1, 40, 4)
    tokens[labels == 2] = torch.inf
    found = segment_sum(tokens, labels, 5)
    assert torch.isfinite(found[0, [0, 1, 3, 4]]).all()
    assert not torch.isfinite(found[0, 2]).any()


def test_gradients(path):
    tokens = white_tokens(2 * 12, 3).view(2, 12, 3).double().requires_grad_()
    labels = labels_of(2, 12, 5)
    assert torch.autograd.gradcheck(lambda t: segment_sum(t, labels, 6), (tokens,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merging_and_its_gradients_run_on_apple_gpus(dtype):
    # Meta tensors take the path of other devices, and have no values to wait for.
    with MissingOnMPS() as operators, torch.device("meta"):
        partition = Partition(torch.empty(2, 50, dtype=torch.int64), 9)
        tokens = torch.empty(2, 50, 4, dtype=dtype, requires_grad=True)
        partition.unmerge(partition.merge(tokens)).sum().backward()
    assert tokens.grad.shape == (2, 50, 4)
    assert not operators.missing


def test_the_first_place_of_each_segment():
    order, first = segments.sort_by_label(torch.tensor([2, 0, 2, 4, 0]), 6)
    assert order.tolist() == [1, 4, 0, 2, 3]
    assert first.tolist() == [0, 2, 2, 4, 4, 5, 5]


def test_nothing_waits_for_the_device():
    with torch.device("meta"):
        labels = torch.empty(2, 10, dtype=torch.int64)
        assert segments._sum_sorted(torch.empty(20, 3), Segments(labels, 4)).shape == (8, 3)


def test_what_depends_on_the_labels_is_computed_once(path):
    labels = labels_of(3, 50, 9)
    kept = Segments(labels, 9)
    for seed in range(3):
        tokens = white_tokens(3 * 50, 4, seed=seed).view(3, 50, 4)
        assert torch.equal(kept.sum(tokens), Segments(labels, 9).sum(tokens))
    assert kept.order is kept.order
    assert kept.sizes is kept.sizes
    assert kept.rows is kept.rows
