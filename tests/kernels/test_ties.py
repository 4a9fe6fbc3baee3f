"""Ties: any greedy order is a valid hierarchy, and it is always the same one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels, lowest_merges
from sd_tokenmerge.kernels.average import AverageClusters
from sd_tokenmerge.kernels.complete import CompleteClusters
from sd_tokenmerge.kernels.rounds import merge_rounds
from tests.kernels.test_agglomerative import DTYPES, searching
from tests.kernels.token_fields import nearing_tokens, white_tokens
from tests.reference import agglomerative as reference


def integer_grid(side: int) -> Tensor:
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack((x.flatten(), y.flatten(), torch.ones(side * side)), 1).float()


def small_integers(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (28, 3), generator=generator).float()


CASES = {
    "all equal": white_tokens(1, 7).repeat(25, 1),
    "all equal up to scale": torch.arange(1.0, 25).unsqueeze(1) * white_tokens(1, 9),
    "every token four times": white_tokens(7, 6).repeat(4, 1),
    "orthogonal": torch.eye(24),
    "orthogonal and opposite": torch.cat((torch.eye(12), -torch.eye(12))),
    "all zero": torch.zeros(20, 3),
    "some zero": torch.cat((torch.zeros(6, 5), white_tokens(15, 5), torch.zeros(3, 5))),
    "one channel": torch.tensor([3.0, -1, 0, 2, 2, -5, 0, 0, 1, -1]).unsqueeze(1),
    "integer grid": integer_grid(5),
    **{f"small integers {seed}": small_integers(seed) for seed in range(8)},
    "regular polygon": torch.stack(
        [torch.tensor([np.cos(a), np.sin(a)]) for a in 2 * np.pi * np.arange(24) / 24]
    ),
}


cases = pytest.mark.parametrize("case", CASES)
linkages = pytest.mark.parametrize("linkage", LINKAGES)


@cases
@linkages
def test_every_merge_is_of_a_closest_pair(case, linkage):
    tokens = CASES[case]
    merges = lowest_merges(tokens, 1, linkage)
    steps = list(zip(*(field.tolist() for field in merges), strict=True))
    assert len(steps) == len(tokens) - 1
    distances = reference.cosine_distances(tokens.numpy())
    assert reference.greedy_violation(distances, steps, linkage) < 1e-12


@cases
def test_single_linkage_has_the_heights_of_scipy(case):
    tokens = CASES[case]
    expected = reference.scipy_tree(tokens.numpy(), "single")[:, 2]
    found = lowest_merges(tokens, 1, "single").height
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    ["all equal", "all equal up to scale", "every token four times", "orthogonal", "all zero"],
)
@linkages
def test_where_ties_leave_no_choice_the_heights_are_those_of_scipy(case, linkage):
    tokens = CASES[case]
    expected = reference.scipy_tree(tokens.numpy(), linkage)[:, 2]
    found = lowest_merges(tokens, 1, linkage).height
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@cases
@linkages
def test_every_cut_has_exactly_k_clusters_and_does_not_depend_on_the_search(case, linkage):
    tokens = CASES[case]
    count = len(tokens)
    for num_clusters in {1, 2, count // 4, count // 2, 3 * count // 4, count - 1, count}:
        labels = agglomerative_labels(tokens[None], num_clusters, linkage)
        assert labels.unique().tolist() == list(range(num_clusters))
        for dtype in DTYPES:
            with searching(dtype):
                again = agglomerative_labels(tokens.repeat(3, 1, 1), num_clusters, linkage)
            assert torch.equal(again, labels.repeat(3, 1))


@linkages
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_equal_tokens(linkage, dtype):
    tokens = torch.cat((white_tokens(1, 12).repeat(400, 1), white_tokens(200, 12)))
    with searching(dtype):
        merges = lowest_merges(tokens, 150, linkage)
    assert (merges.height[:399] < 1e-12).all()
    assert (merges.height[399:] > 1e-3).all()
    labels = merges.labels(600)
    assert (labels[:400] == 0).all()
    assert labels.max() == 149


class CountingAverage(AverageClusters):
    rounds = 0

    def merge(self, left, right):
        self.rounds += 1
        super().merge(left, right)


class CountingComplete(CompleteClusters):
    rounds = 0

    def merge(self, left, right):
        self.rounds += 1
        super().merge(left, right)


@pytest.mark.parametrize(
    "tokens", [torch.ones(256, 3), torch.zeros(256, 3), torch.eye(256)], ids=["ones", "zero", "eye"]
)
def test_total_ties_take_log2_rounds(tokens):
    for clusters in (CountingAverage(tokens), CountingComplete(tokens)):
        assert len(merge_rounds(clusters, 255).left) == 255
        assert clusters.rounds == 8


@linkages
def test_a_chain_of_ever_nearer_neighbours_ends(linkage):
    tokens = nearing_tokens(150)
    for num_clusters in (1, 40):
        labels = agglomerative_labels(tokens[None], num_clusters, linkage)
        expected = reference.agglomerative_labels(tokens.numpy(), num_clusters, linkage)
        np.testing.assert_array_equal(labels[0].numpy(), expected)
