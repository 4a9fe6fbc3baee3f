import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from sd_tokenmerge.methods import Grid, KMeans, partition
from sd_tokenmerge.methods.distances import center_tokens
from sd_tokenmerge.methods.token_pooling import starting_tokens
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
        KMeans(weighted=weighted, iterations=iterations),
        num_clusters=num_clusters,
        grid=GRID,
        scores=scores if weighted else None,
    )
    for image in range(2):
        x = tokens[image].numpy()
        w = scores[image].numpy() if weighted else np.ones(len(x))
        start = reference.highest if weighted else reference.farthest_first
        start = start(w if weighted else x, num_clusters)
        expected = reference.kmeans_labels(x, start, w, iterations)
        assert as_sets(result.labels[image]) == as_sets(expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_equal_to_scikit_learn(weighted):
    grid = Grid(16, 16)
    tokens = random_tokens(1, grid).double()
    scores = random_tokens(1, grid, channels=1, seed=4)[..., 0].double().abs()
    start = starting_tokens(center_tokens(tokens), 40, scores if weighted else None)
    theirs = SklearnKMeans(
        n_clusters=40, init=tokens[0, start[0]].numpy(), n_init=1, max_iter=5, tol=0
    )
    theirs.fit(tokens[0].numpy(), sample_weight=scores[0].numpy() if weighted else None)
    ours = partition(
        tokens,
        KMeans(weighted=weighted, iterations=5),
        num_clusters=40,
        grid=grid,
        scores=scores if weighted else None,
    )
    assert as_sets(ours.labels[0]) == as_sets(theirs.labels_)


def test_an_empty_cluster_takes_the_farthest_token():
    # Both centers start on the two equal tokens of highest score; the second attracts nothing.
    tokens = torch.tensor([[[0.0], [0.0], [1.0], [10.0]]])
    scores = torch.tensor([[9.0, 8.0, 1.0, 1.0]])
    result = KMeans(weighted=True)(tokens, 2, grid=Grid(2, 2), scores=scores)
    assert result.labels.tolist() == [[0, 0, 0, 1]]


def test_iterations_lower_the_error():
    grid = Grid(12, 12)
    tokens = random_tokens(2, grid)
    errors = []
    for iterations in (1, 2, 5, 20):
        result = partition(tokens, KMeans(iterations=iterations), num_clusters=30, grid=grid)
        errors.append(float((result.unmerge(result.merge(tokens)) - tokens).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_farthest_first_is_the_traversal_and_never_takes_a_token_twice():
    tokens = random_tokens(2, GRID, channels=3).double()
    for image, chosen in enumerate(starting_tokens(center_tokens(tokens), 40, None)):
        assert chosen.tolist() == reference.farthest_first(tokens[image].numpy(), 40)
    equal = starting_tokens(torch.zeros(1, 40, 3), 40, None)
    assert sorted(equal[0].tolist()) == list(range(40))


def test_equal_scores_start_at_the_first_tokens():
    scores = torch.tensor([[0.5, 2.0, 2.0, 0.5, 2.0]])
    assert starting_tokens(torch.zeros(1, 5, 3), 4, scores).tolist() == [[1, 2, 4, 0]]
