import pytest
import torch

from sd_tokenmerge.methods import DPCKNN, Grid, partition
from tests.methods.variants import random_tokens
from tests.reference.dpc_knn import dpc_knn_labels
from tests.reference.sets import as_sets


# Not k = 2: two tokens that are nearest to each other then have equal densities.
@pytest.mark.parametrize("k", [1, 3, 5, 20])
@pytest.mark.parametrize("grid", [Grid(5, 5), Grid(4, 9)])
def test_equal_to_one_token_at_a_time(grid, k):
    tokens = random_tokens(2, grid).double()
    for num_clusters in (1, 2, 7, grid.num_tokens // 2, grid.num_tokens - 1):
        labels = partition(tokens, DPCKNN(k=k), num_clusters=num_clusters, grid=grid).labels
        for image in range(2):
            expected = dpc_knn_labels(tokens[image].numpy(), num_clusters, k)
            assert as_sets(labels[image]) == as_sets(expected)


def test_distances_are_scaled_by_the_number_of_channels():
    grid = Grid(5, 5)
    tokens = random_tokens(1, grid).double()
    repeated = tokens.repeat(1, 1, 9)  # the same mean squared difference per channel
    expected = partition(tokens, "dpc-knn", num_clusters=8, grid=grid).labels
    assert torch.equal(partition(repeated, "dpc-knn", num_clusters=8, grid=grid).labels, expected)


def test_peaks_of_density_are_found():
    generator = torch.Generator().manual_seed(0)
    peaks = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    tokens = peaks.repeat_interleave(12, 0) + 0.5 * torch.randn(36, 2, generator=generator)
    labels = partition(tokens[None], "dpc-knn", num_clusters=3, grid=(6, 6)).labels
    assert as_sets(labels[0]) == {frozenset(range(i, i + 12)) for i in (0, 12, 24)}


def test_densities_do_not_underflow():
    # exp(-mean squared distance) is 0 in float32 for all of these tokens.
    grid = Grid(5, 5)
    tokens = 100 * random_tokens(1, grid)
    labels = partition(tokens, "dpc-knn", num_clusters=8, grid=grid).labels
    expected = partition(tokens.double(), "dpc-knn", num_clusters=8, grid=grid).labels
    assert torch.equal(labels, expected)
    assert len(set(labels[0, :8].tolist())) < 8  # not simply the first tokens


def test_more_neighbours_than_tokens_are_refused():
    with pytest.raises(ValueError, match="`k` of dpc-knn:k=26 must be at most N = 25"):
        partition(random_tokens(1, Grid(5, 5)), DPCKNN(k=26), num_clusters=8, grid=(5, 5))
