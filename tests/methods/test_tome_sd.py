import numpy as np
import pytest
import torch
from tomesd.merge import bipartite_soft_matching_random2d

from sd_tokenmerge.methods import Grid, ToMeSD
from tests.methods.variants import random_tokens, run
from tests.reference.bipartite import bipartite_clusters, top_left_destinations
from tests.reference.sets import as_sets
from tests.reference.token_pooling import lloyd

GRIDS = [Grid(6, 6), Grid(4, 10), Grid(7, 9), Grid(5, 4), Grid(2, 2), Grid(9, 13)]


def numbers_of_clusters(method, grid):
    fewest = method.smallest_num_clusters(grid)
    asked = {fewest, (fewest + grid.num_tokens) // 2, grid.num_tokens - 1}
    return sorted(number for number in asked if number >= fewest)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("grid", [*GRIDS, Grid(5, 4, 3)])
def test_equal_to_one_token_at_a_time(grid, stride):
    method = ToMeSD(stride=stride)
    tokens = random_tokens(2, grid)
    image = top_left_destinations(grid.height, grid.width, stride)
    starts = range(0, grid.num_tokens, grid.height * grid.width)
    destinations = [start + token for start in starts for token in image]
    if not destinations:
        assert numbers_of_clusters(method, grid) == [grid.num_tokens]
        return
    for num_clusters in numbers_of_clusters(method, grid):
        labels = run(method, tokens, num_clusters, grid).labels
        for image in range(2):
            expected = bipartite_clusters(tokens[image].numpy(), destinations, num_clusters)
            assert as_sets(labels[image]) == expected


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("grid", [Grid(6, 6), Grid(7, 9), Grid(5, 4, 3)])
def test_lloyd_iterations_are_those_of_k_means(grid, iterations):
    tokens = random_tokens(2, grid).double()
    for num_clusters in numbers_of_clusters(ToMeSD(), grid):
        start = run(ToMeSD(), tokens, num_clusters, grid).labels
        labels = run(ToMeSD(lloyd=iterations), tokens, num_clusters, grid).labels
        for image in range(2):
            expected = lloyd(
                tokens[image].numpy(),
                start[image].tolist(),
                np.ones(grid.num_tokens),
                iterations,
            )
            assert as_sets(labels[image]) == as_sets(expected)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("grid", "stride"),
    [
        (grid, stride)
        for grid in GRIDS
        for stride in (2, 3, 4)
        if min(grid.height, grid.width) >= stride
    ],
)
def test_equal_to_tomesd(grid, stride, random):
    method = ToMeSD(stride=stride, random=random)
    features, tokens = random_tokens(3, grid, seed=1), random_tokens(3, grid, seed=2)
    for num_clusters in numbers_of_clusters(method, grid):
        merge, unmerge = bipartite_soft_matching_random2d(
            features,
            grid.width,
            grid.height,
            stride,
            stride,
            grid.num_tokens - num_clusters,
            no_rand=not random,
            generator=torch.Generator().manual_seed(5),
        )
        ours = run(method, features, num_clusters, grid, seed=5)
        assert merge(tokens).shape[1] == num_clusters
        torch.testing.assert_close(
            ours.unmerge(ours.merge(tokens)), unmerge(merge(tokens)), atol=1e-5, rtol=0
        )


def test_random_destinations_are_one_per_cell_and_vary_between_cells_and_seeds():
    grid = Grid(8, 24, frames=2)
    drawn = set()
    for seed in range(50):
        mask = ToMeSD(random=True)._destinations(grid, seed).view(8, 2, 12, 2)
        assert (mask.sum(dim=(1, 3)) == 1).all()
        drawn.add(tuple(mask.reshape(-1).tolist()))
    assert len(drawn) == 50
    # Each of the four places in a cell is drawn about a quarter of the time.
    counts = sum(
        ToMeSD(random=True)._destinations(grid, seed).view(8, 2, 12, 2).sum(dim=(0, 2))
        for seed in range(50)
    )
    assert (counts.float() / counts.sum() - 0.25).abs().max() < 0.02


def test_all_images_of_a_batch_share_the_draw():
    grid = Grid(8, 8)
    tokens = random_tokens(1, grid).expand(4, -1, -1)
    labels = run(ToMeSD(random=True), tokens, 16, grid, seed=3).labels
    assert torch.equal(labels, labels[:1].expand(4, -1))


@pytest.mark.parametrize(
    ("grid", "stride", "fewest"),
    [
        (Grid(64, 64), 2, 1024),
        (Grid(7, 9), 2, 12),
        (Grid(64, 64), 4, 256),
        (Grid(3, 8), 4, 24),
        (Grid(1, 8), 2, 8),
        (Grid(7, 9, 3), 2, 36),
        (Grid(1, 8, 2), 2, 16),
    ],
)
def test_reach_is_the_number_of_whole_cells(grid, stride, fewest):
    assert ToMeSD(stride=stride).smallest_num_clusters(grid) == fewest
