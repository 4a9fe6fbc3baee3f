"""The public `partition()`: what it accepts, what it refuses, what it says."""

import pytest
import torch

from sd_tokenmerge.methods import ATC, Grid, KMeans, partition
from tests.methods.variants import random_tokens

GRID = Grid(4, 5)
TOKENS = random_tokens(2, GRID)
SCORES = torch.rand(2, 20)


def test_a_string_a_method_and_the_default_agree():
    default = partition(TOKENS, num_clusters=7, grid=(4, 5)).labels
    assert torch.equal(partition(TOKENS, "atc", num_clusters=7, grid=GRID).labels, default)
    assert torch.equal(partition(TOKENS, ATC(), num_clusters=7, grid=GRID).labels, default)


def test_it_does_what_the_method_does():
    result = partition(TOKENS, "kmeans:weighted=true", num_clusters=7, grid=GRID, scores=SCORES)
    expected = KMeans(weighted=True)(TOKENS, 7, grid=GRID, scores=SCORES)
    assert torch.equal(result.labels, expected.labels)
    assert result.num_clusters == 7


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": TOKENS.numpy()}, TypeError, "`tokens` must be a tensor, got ndarray"),
        ({"tokens": TOKENS.long()}, TypeError, "`tokens` must be floating point, got torch.int64"),
        ({"tokens": TOKENS.to(torch.complex64)}, TypeError, "`tokens` must be floating point"),
        ({"tokens": TOKENS[0]}, ValueError, r"`tokens` must be .* got \[20, 8\]"),
        ({"tokens": TOKENS[None]}, ValueError, r"`tokens` must be .* got \[1, 2, 20, 8\]"),
        ({"tokens": TOKENS[:0]}, ValueError, r"`tokens` must be a non-empty .* got \[0, 20, 8\]"),
        ({"tokens": TOKENS[:, :0]}, ValueError, "`tokens` must be a non-empty"),
        ({"tokens": TOKENS[..., :0]}, ValueError, "`tokens` must be a non-empty"),
        ({"tokens": TOKENS.log()}, ValueError, "`tokens` must be finite"),
        ({"tokens": TOKENS / 0}, ValueError, "`tokens` must be finite"),
        ({"method": "atx"}, ValueError, "`method` must be one of"),
        ({"method": None}, TypeError, "`method` must be a string or a Method"),
        ({"grid": (4, 6)}, ValueError, "`grid` must be positive and hold the 20 tokens, got 4x6"),
        ({"grid": (-4, -5)}, ValueError, "`grid` must be positive"),
        ({"grid": (4, 5, 2)}, ValueError, "hold the 20 tokens, got 2x4x5"),
        ({"grid": 20}, TypeError, r"`grid` must be \(height, width\) or .* got 20"),
        ({"grid": (4, 5, 1, 1)}, TypeError, "`grid` must be"),
        ({"grid": (4.0, 5.0)}, TypeError, "`grid` must be"),
        ({"grid": [4, 5]}, TypeError, "`grid` must be"),
        ({"num_clusters": 0}, ValueError, r"`num_clusters` must be in \[1, 20\]"),
        ({"num_clusters": 21}, ValueError, r"`num_clusters` must be in \[1, 20\]"),
        ({"num_clusters": 10.0}, TypeError, "`num_clusters` must be an integer, got 10.0"),
        ({"num_clusters": True}, TypeError, "`num_clusters` must be an integer, got True"),
        ({"num_clusters": 9, "method": "tome"}, ValueError, r"must be in \[10, 20\] for tome"),
        ({"seed": -1}, ValueError, r"`seed` must be in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, ValueError, "`seed` must be in"),
        ({"seed": 0.5}, TypeError, "`seed` must be an integer, got 0.5"),
        ({"seed": None}, TypeError, "`seed` must be an integer, got None"),
        ({"scores": SCORES}, ValueError, "`scores` must be None for atc, which does not use them"),
        ({"method": "kmeans:weighted=true"}, ValueError, "`scores` must be given for kmeans:weigh"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    arguments = {"tokens": TOKENS, "method": "atc", "num_clusters": 10, "grid": GRID} | changes
    with pytest.raises(error, match=message):
        partition(**arguments)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (SCORES.numpy(), TypeError, "`scores` must be a tensor, got ndarray"),
        (SCORES.long(), TypeError, "`scores` must be floating point, got torch.int64"),
        (SCORES[0], ValueError, r"`scores` must be \[2, 20\] like the tokens, got \[20\]"),
        (SCORES[..., None], ValueError, r"`scores` must be \[2, 20\] .* got \[2, 20, 1\]"),
        (SCORES.T, ValueError, r"`scores` must be \[2, 20\] .* got \[20, 2\]"),
        (-SCORES, ValueError, "`scores` must be finite and non-negative"),
        (SCORES / 0, ValueError, "`scores` must be finite and non-negative"),
        (SCORES * torch.nan, ValueError, "`scores` must be finite and non-negative"),
        (SCORES.to("meta"), ValueError, "`scores` must be on the tokens' device cpu, got meta"),
    ],
)
def test_bad_scores_are_refused(scores, error, message):
    with pytest.raises(error, match=message):
        partition(TOKENS, "kmedoids:weighted=true", num_clusters=10, grid=GRID, scores=scores)


def test_zero_scores_are_scores():
    result = partition(
        TOKENS, "kmeans:weighted=true", num_clusters=10, grid=GRID, scores=torch.zeros(2, 20)
    )
    assert torch.isfinite(result.merge(TOKENS)).all()
