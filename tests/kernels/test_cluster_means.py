"""Means of clusters, against sums of all unit vectors in float64."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels import cluster_means
from sd_tokenmerge.kernels.cluster_means import ClusterMeans
from sd_tokenmerge.kernels.exact import unit_vectors
from tests.kernels.token_fields import white_tokens

COUNT = 90


def random_pairs(alive, generator):
    """Disjoint pairs of half of the clusters, the lower one left."""
    chosen = alive[torch.randperm(len(alive), generator=generator)][: len(alive) // 4 * 2]
    one, other = chosen.view(2, -1)
    return torch.minimum(one, other), torch.maximum(one, other)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("channels", [1, 24, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_are_those_of_sums_of_unit_vectors(channels, dtype, by_channel, monkeypatch):
    monkeypatch.setattr(cluster_means, "_KEPT_AT_ONCE", 7)
    tokens = white_tokens(COUNT, channels).to(dtype)
    if by_channel:
        tokens = tokens.T.contiguous().T
    means = ClusterMeans(tokens)
    sums, size = unit_vectors(tokens), torch.ones(COUNT, dtype=torch.float64)
    alive, generator = torch.arange(COUNT), torch.Generator().manual_seed(channels)
    assert torch.equal(means.rounded, sums.float())
    while len(alive) > 5:
        left, right = random_pairs(alive, generator)
        means.keep(torch.cat((left[:1], left[:1], alive[-2:])))  # twice, and not to be merged
        means.merge(left, right)
        sums[left] += sums[right]
        size[left] += size[right]
        alive = torch.tensor(sorted(set(alive.tolist()) - set(right.tolist())))
        shuffled = alive[torch.randperm(len(alive), generator=generator)]
        expected = sums[shuffled] / size[shuffled].unsqueeze(1)
        assert torch.equal(means.exact(shuffled), expected)
        assert torch.equal(means.rounded[shuffled], expected.float())
        assert torch.equal(means.size[shuffled], size[shuffled])


def test_only_what_is_merged_is_kept():
    means = ClusterMeans(white_tokens(1000, 200))
    means.exact(torch.arange(1000))
    assert len(means._sums) == 0
    first = torch.arange(0, 100, 2)
    means.merge(first, first + 1)
    assert len(means._sums) == 100
    means.merge(torch.arange(200, 300, 2), torch.arange(201, 300, 2))
    assert len(means._sums) == 150  # those of merged tokens are used again


def test_not_finite_tokens_are_refused():
    tokens = torch.ones(4, 300)
    tokens[2, 1] = torch.nan
    with pytest.raises(ValueError, match="`tokens` must be finite"):
        ClusterMeans(tokens)
