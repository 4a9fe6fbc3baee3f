import pytest
import torch

from sd_tokenmerge.methods import Grid, ToMe
from tests.methods.variants import random_tokens, run
from tests.reference.bipartite import bipartite_clusters
from tests.reference.sets import as_sets


@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(3, 7), Grid(1, 2), Grid(8, 8)])
def test_equal_to_one_token_at_a_time(grid):
    tokens = random_tokens(3, grid)
    destinations = list(range(1, grid.num_tokens, 2))
    for num_clusters in range((grid.num_tokens + 1) // 2, grid.num_tokens + 1):
        labels = run(ToMe(), tokens, num_clusters, grid).labels
        for image in range(3):
            expected = bipartite_clusters(tokens[image].numpy(), destinations, num_clusters)
            assert as_sets(labels[image]) == expected


def test_clusters_are_numbered_in_the_order_of_destinations_and_unmerged_sources():
    # Token 2 is like token 1, token 0 like token 3.
    tokens = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.9, 0.1], [0.1, 0.9]]])
    assert ToMe()(tokens, 3, grid=Grid(1, 4)).labels.tolist() in ([[0, 1, 1, 2]], [[2, 0, 1, 2]])
    assert ToMe()(tokens, 2, grid=Grid(1, 4)).labels.tolist() == [[1, 0, 0, 1]]


def test_cosine_ignores_the_length_of_tokens():
    grid = Grid(6, 6)
    tokens = random_tokens(1, grid)
    lengths = torch.rand(1, grid.num_tokens, 1) + 0.1
    expected = run(ToMe(), tokens, 20, grid).labels
    assert torch.equal(run(ToMe(), tokens * lengths, 20, grid).labels, expected)


def test_half_of_the_tokens_rounded_up_stay():
    assert ToMe().smallest_num_clusters(Grid(4, 4)) == 8
    assert ToMe().smallest_num_clusters(Grid(3, 5)) == 8
    assert ToMe().smallest_num_clusters(Grid(1, 1)) == 1
