"""Cutting a hierarchy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sd_tokenmerge.kernels.hierarchy import Merges, concatenate


@pytest.mark.parametrize("num_tokens", [2, 3, 50, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_the_components_of_the_forest(num_tokens, seed):
    random = np.random.default_rng(seed)
    order = random.permutation(num_tokens)
    count = random.integers(1, num_tokens)
    later = random.choice(np.arange(1, num_tokens), count, replace=False)
    left, right = order[later], order[random.integers(0, later)]  # each to an earlier one: a forest
    merges = Merges(torch.from_numpy(left), torch.from_numpy(right), torch.zeros(count))
    labels = merges.labels(num_tokens).numpy()
    graph = coo_array((np.ones(count), (left, right)), shape=(num_tokens, num_tokens))
    _, expected = connected_components(graph, directed=False)
    first = np.unique(expected, return_index=True)[1]
    np.testing.assert_array_equal(labels, np.argsort(np.argsort(first))[expected])
    assert labels.max() == num_tokens - count - 1


def test_a_long_chain_in_any_order():
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    merges = Merges(order[:-1], order[1:], torch.zeros(4999))
    assert torch.equal(merges.labels(5000), torch.zeros(5000, dtype=torch.int64))


def test_among_equal_heights_the_earlier_merges_are_lower():
    parts = [
        Merges(torch.tensor([0, 4]), torch.tensor([1, 5]), torch.tensor([0.5, 0.2])),
        Merges(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.5])),
    ]
    assert concatenate(parts).lowest(2).right.tolist() == [5, 1]
    assert concatenate(parts).lowest(3).right.tolist() == [5, 1, 2]
