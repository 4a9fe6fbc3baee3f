"""The two controls: regular pooling and random clusters."""

import pytest
import torch

from sd_tokenmerge.methods import Grid, GridPooling, RandomClusters
from tests.methods.variants import random_tokens, run
from tests.reference.grid_pooling import grid_cells
from tests.reference.sets import as_sets


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(5, 7), Grid(1, 6), Grid(6, 1), Grid(8, 3)])
def test_grid_cells_are_equal_to_trying_all(grid):
    for num_clusters in range(1, grid.num_tokens + 1):
        labels = run(GridPooling(), random_tokens(2, grid), num_clusters, grid).labels
        expected = {frozenset(cell) for cell in grid_cells(grid.height, grid.width, num_clusters)}
        assert as_sets(labels[0]) == as_sets(labels[1]) == expected


def test_grid_cells_are_squares_where_the_numbers_allow():
    labels = run(GridPooling(), random_tokens(1, Grid(8, 8)), 16, Grid(8, 8)).labels.view(8, 8)
    squares = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(labels, squares)
    halves = run(GridPooling(), random_tokens(1, Grid(8, 8)), 32, Grid(8, 8))
    assert set(halves.sizes[0].tolist()) == {2}


def test_the_frames_of_a_video_are_cut_like_images():
    video, image = Grid(3, 4, 5), Grid(3, 4)
    tokens = random_tokens(1, video)
    for num_clusters in range(video.frames, video.num_tokens + 1):
        frames = run(GridPooling(), tokens, num_clusters, video).labels.view(video.frames, -1)
        counts = [len(frame.unique()) for frame in frames]
        assert sum(counts) == num_clusters
        assert max(counts) - min(counts) <= 1
        for frame, count in zip(frames, counts, strict=True):
            alone = run(GridPooling(), tokens[:, : image.num_tokens], count, image).labels[0]
            assert torch.equal(frame - frame.min(), alone)


@pytest.mark.parametrize(("num_clusters", "runs"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2])])
def test_fewer_clusters_than_frames_are_runs_of_frames(num_clusters, runs):
    video = Grid(3, 4, 5)
    labels = run(GridPooling(), random_tokens(1, video), num_clusters, video).labels[0]
    assert (labels.diff() >= 0).all()
    assert labels.bincount().tolist() == [12 * run for run in runs]


def test_random_clusters_ignore_the_tokens():
    grid = Grid(6, 7)
    one = run(RandomClusters(), random_tokens(2, grid, seed=1), 20, grid, seed=3).labels
    other = run(RandomClusters(), random_tokens(2, grid, seed=2), 20, grid, seed=3).labels
    assert torch.equal(one, other)
    assert torch.equal(one[0], one[1])


def test_random_clusters_are_uniform():
    # With one founder drawn for each of K clusters, two tokens share a cluster with the same
    # probability whichever two they are.
    grid = Grid(2, 4)
    tokens = random_tokens(1, grid)
    draws = 3000
    together = torch.zeros(8, 8)
    for seed in range(draws):
        labels = RandomClusters()(tokens, 5, grid=grid, seed=seed).labels[0]
        together += labels[:, None] == labels
    together = together[~torch.eye(8, dtype=torch.bool)] / draws
    assert together.max() - together.min() < 0.06  # about 6 standard errors
