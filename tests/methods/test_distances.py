import numpy as np
import pytest
import torch

from sd_tokenmerge.methods import Grid, distances
from sd_tokenmerge.methods.numbering import (
    cheapest_members,
    labels_from_roots,
    number_by_first_token,
)
from tests.methods.variants import VARIANTS, random_tokens, run

ROWS = random_tokens(2, Grid(5, 7)).double()
COLUMNS = random_tokens(2, Grid(3, 4), seed=1).double()


def test_nearest_is_the_smallest_of_all_distances():
    distance, index = distances.nearest(ROWS, COLUMNS)
    expected = torch.cdist(ROWS, COLUMNS).square().min(-1)
    torch.testing.assert_close(distance, expected.values)
    assert torch.equal(index, expected.indices)


def test_most_similar_is_the_largest_of_all_cosines():
    similarity, index = distances.most_similar(
        distances.unit_tokens(ROWS), distances.unit_tokens(COLUMNS)
    )
    expected = torch.cosine_similarity(ROWS[:, :, None], COLUMNS[:, None], dim=-1).max(-1)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(index, expected.indices)


def test_unit_tokens_keep_zero():
    unit = distances.unit_tokens(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_centering_keeps_digits_of_distances_between_far_away_tokens():
    tokens = random_tokens(1, Grid(6, 6)) + 3000
    exact = torch.cdist(tokens.double(), tokens.double())[0].square()
    centered = distances.center_tokens(tokens)[0]
    torch.testing.assert_close(
        distances.squared_distances(centered, centered).double(), exact, atol=1e-2, rtol=1e-3
    )
    assert (distances.squared_distances(tokens[0], tokens[0]).double() - exact).abs().max() > 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (10, 3), (7, 100), (5, 10**9)])
def test_blocks_cover_all_rows_within_the_limit(rows, columns, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK_SIZE", 20)
    blocks = list(distances.row_blocks(rows, columns))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert all((b.stop - b.start) * columns <= 20 or b.stop - b.start == 1 for b in blocks)


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_blocks_do_not_change_the_result(method, monkeypatch):
    grid = Grid(7, 6)
    tokens = random_tokens(2, grid).double()
    whole = run(method, tokens, 25, grid).labels
    monkeypatch.setattr(distances, "BLOCK_SIZE", 100)
    assert torch.equal(run(method, tokens, 25, grid).labels, whole)


def test_roots_number_the_clusters():
    roots = torch.tensor([[3, 1, 1, 3, 4], [0, 1, 2, 3, 4]])
    assert labels_from_roots(roots).tolist() == [[1, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_first_tokens_number_the_clusters():
    labels = torch.tensor([[2, 0, 2, 1], [1, 1, 0, 2]])
    assert number_by_first_token(labels, 3).tolist() == [[0, 1, 0, 2], [0, 0, 1, 2]]


def test_cheapest_members():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels = generator.permutation(
            np.concatenate([np.arange(6), generator.integers(6, size=9)])
        )
        cost = generator.integers(4, size=15)
        expected = [min(np.flatnonzero(labels == k), key=lambda i: cost[i]) for k in range(6)]
        found = cheapest_members(torch.tensor(labels)[None], torch.tensor(cost)[None].float(), 6)
        assert found[0].tolist() == expected
