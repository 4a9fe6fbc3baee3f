import math
from itertools import pairwise

import pytest
import torch

from sd_tokenmerge.methods import Grid, LoTM
from sd_tokenmerge.methods.adjacent_pairs import match_greedily, next_size
from tests.methods.variants import random_tokens, run
from tests.reference.lotm import grid_clusters, row_clusters
from tests.reference.sets import as_sets

GRIDS = [Grid(4, 4), Grid(3, 5), Grid(1, 9), Grid(7, 1), Grid(6, 8), Grid(3, 4, 3)]


@pytest.mark.parametrize("grid", GRIDS)
def test_row_pairs_are_equal_to_the_equations(grid):
    tokens = random_tokens(2, grid)
    for num_clusters in range(1, grid.num_tokens + 1):
        labels = run(LoTM(), tokens, num_clusters, grid).labels
        for image in range(2):
            assert as_sets(labels[image]) == row_clusters(tokens[image].numpy(), num_clusters)


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_pairs_are_equal_to_matching_one_pair_at_a_time(grid):
    tokens = random_tokens(2, grid)
    for num_clusters in range(1, grid.num_tokens + 1, 2):
        labels = run(LoTM(neighbours="grid"), tokens, num_clusters, grid).labels
        for image in range(2):
            expected = grid_clusters(tokens[image].numpy(), num_clusters, grid.shape)
            assert as_sets(labels[image]) == expected


def test_one_application_merges_the_most_similar_adjacent_pairs():
    angles = torch.tensor([[0.0, 0.3, 1.0, 1.1, 2.0, 2.2]])  # pairs differ by 0.3, 0.1 and 0.2
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)
    grid = Grid(2, 3)
    assert run(LoTM(), tokens, 5, grid).labels.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert run(LoTM(), tokens, 4, grid).labels.tolist() == [[0, 1, 2, 2, 3, 3]]
    assert run(LoTM(), tokens, 3, grid).labels.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_clusters_are_connected():
    grid = Grid(4, 5, 2)
    tokens = random_tokens(1, grid)
    for num_clusters in (30, 20, 8, 2):
        rows = run(LoTM(), tokens, num_clusters, grid).labels[0]
        assert (rows.diff() >= 0).all()  # neighbours in the sequence
        labels = run(LoTM(neighbours="grid"), tokens, num_clusters, grid).labels[0].view(grid.shape)
        for cluster in range(num_clusters):
            places = {tuple(place) for place in (labels == cluster).nonzero().tolist()}
            reached, frontier = set(), [min(places)]
            while frontier:
                t, y, x = place = frontier.pop()
                if place in places and place not in reached:
                    reached.add(place)
                    frontier += [(t, y + 1, x), (t, y - 1, x), (t, y, x + 1), (t, y, x - 1)]
                    frontier += [(t + 1, y, x), (t - 1, y, x)]
            assert reached == places


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 100, 4096, 5785])
def test_sizes_shrink_as_evenly_as_halving_allows(num_tokens):
    for num_clusters in {1, 2, num_tokens // 10, num_tokens // 4, num_tokens // 2, num_tokens - 1}:
        if not 1 <= num_clusters < num_tokens:
            continue
        sizes = [num_tokens]
        while sizes[-1] > num_clusters:
            sizes.append(next_size(sizes[-1], num_clusters))
        assert sizes[-1] == num_clusters
        assert len(sizes) - 1 == math.ceil(math.log2(num_tokens / num_clusters))
        assert all(after >= (before + 1) // 2 for before, after in pairwise(sizes))
        shares = [after / before for before, after in pairwise(sizes)]
        if num_clusters > 100:
            assert max(shares) - min(shares) < 0.01


def test_matching_takes_the_edges_of_a_walk_through_the_list():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        one, other = torch.randint(12, (2, 40), generator=generator)
        taken, used = [], set()
        for edge, ends in enumerate(zip(one.tolist(), other.tolist(), strict=True)):
            if ends[0] != ends[1] and not used & set(ends):
                used |= set(ends)
                taken.append(edge)
        assert match_greedily(one, other, 12).tolist() == taken
