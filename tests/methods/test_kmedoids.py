import numpy as np
import pytest
import torch

from sd_tokenmerge.methods import Grid, KMedoids, partition
from tests.methods.variants import random_tokens
from tests.reference import token_pooling as reference
from tests.reference.sets import as_sets

GRID = Grid(5, 8)


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_clusters", [1, 3, 12, 20, 36, 39])
def test_equal_to_loops(num_clusters, weighted, iterations):
    tokens = random_tokens(2, GRID, channels=3).double()
    scores = random_tokens(2, GRID, channels=1, seed=4)[..., 0].double().abs()
    scores[:, ::5] = 0
    result = partition(
        tokens,
        KMedoids(weighted=weighted, iterations=iterations),
        num_clusters=num_clusters,
        grid=GRID,
        scores=scores if weighted else None,
    )
    for image in range(2):
        x = tokens[image].numpy()
        w = scores[image].numpy() if weighted else np.ones(len(x))
        start = reference.highest if weighted else reference.farthest_first
        start = start(w if weighted else x, num_clusters)
        labels, medoids = reference.kmedoids(x, start, w, iterations)
        assert as_sets(result.labels[image]) == as_sets(labels)
        assert sorted(medoids) == result.representatives[image].tolist()


@pytest.mark.parametrize("medoid", ["paper", "public"])
def test_the_merged_token_is_the_medoid(medoid):
    tokens = random_tokens(2, GRID)
    result = partition(tokens, KMedoids(medoid=medoid), num_clusters=10, grid=GRID)
    merged = result.merge(tokens)
    for image in range(2):
        assert torch.equal(merged[image], tokens[image, result.representatives[image]])
        own = result.labels[image, result.representatives[image]]
        assert own.tolist() == list(range(10))


def test_equal_scores_are_no_scores_but_for_the_start():
    tokens = random_tokens(1, GRID)
    weighted = KMedoids(weighted=True, iterations=50)
    halves, ones = (
        partition(
            tokens, weighted, num_clusters=10, grid=GRID, scores=torch.full((1, 40), value)
        ).labels
        for value in (0.5, 1.0)
    )
    assert torch.equal(halves, ones)


def test_a_high_score_draws_the_medoid():
    tokens = torch.tensor([[[0.0], [1.0], [2.0], [3.0], [100.0]]])
    for favourite in range(4):
        scores = torch.ones(1, 5)
        scores[0, favourite] = 50
        scores[0, 4] = 60
        result = KMedoids(weighted=True)(tokens, 2, grid=Grid(1, 5), scores=scores)
        assert result.labels.tolist() == [[0, 0, 0, 0, 1]]
        assert result.representatives.tolist() == [[favourite, 4]]
