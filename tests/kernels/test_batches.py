"""The searches of a batch, all images at once or one by one, claim no more than they know."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels import average, batches, images, ranking
from sd_tokenmerge.kernels.agglomerative import agglomerative_labels, lowest_merges
from sd_tokenmerge.kernels.batches import MOST_CANDIDATES, all_candidates, batch_lists, first_lists
from sd_tokenmerge.kernels.exact import unit_vectors
from sd_tokenmerge.kernels.parts import parts_of
from sd_tokenmerge.kernels.ranking import LANES, close_to_largest
from sd_tokenmerge.kernels.search import float32_error
from tests.kernels.test_search import DTYPES, check, fields
from tests.kernels.token_fields import smooth_tokens, white_tokens


def apart(batch: int, count: int) -> torch.Tensor:
    """Which pairs of a batch's tokens are of two images, or one token twice."""
    image = torch.arange(batch * count) // count
    return (image != image.unsqueeze(1)) | torch.eye(batch * count, dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_first_lists_of_images_one_by_one(number, dtype, monkeypatch):
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    unit = unit_vectors(fields()[number])
    batch = torch.stack((unit, unit.flip(0)))
    flat = batch.flatten(0, 1)
    check(first_lists(batch.float(), dtype), flat, flat, apart(2, len(unit)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_lists_of_some_rows_of_some_images(number, dtype, monkeypatch):
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    unit = unit_vectors(fields()[number])
    count = len(unit)
    batch = torch.stack((unit, unit.flip(0), unit.roll(1, 0)))
    place, image = torch.arange(3 * count) % count, torch.arange(3 * count) // count
    in_play = place < torch.tensor([count // 2, count, 2 * count // 3])[image]
    columns = torch.where(in_play)[0]
    rows = columns[(image[columns] != 1) & (place[columns] % 3 == 0)]  # none of the second image
    left_out = (apart(3, count) | ~in_play)[rows]
    flat = batch.flatten(0, 1)
    check(batch_lists(batch.float(), rows, columns, dtype), flat[rows], flat, left_out)


def test_large_images_together_are_clustered_like_each_alone(monkeypatch):
    batch = torch.stack((white_tokens(600, 12), smooth_tokens(20, 30, 12), torch.ones(600, 12)))
    alone = torch.cat([agglomerative_labels(image[None], 60, "average") for image in batch])
    monkeypatch.setattr(average, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    assert torch.equal(agglomerative_labels(batch, 60, "average"), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_parts_for_more_columns_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    tokens = smooth_tokens(64, 65, 8)[None]
    assert parts_of(tokens.shape[1]) == 128
    found = lowest_merges(tokens, 2000, "average", search_dtype=dtype)
    monkeypatch.setattr("sd_tokenmerge.kernels.nearest.parts_of", lambda count: 64)
    monkeypatch.setattr("sd_tokenmerge.kernels.parts.parts_of", lambda count: 64)
    for one, other in zip(
        found, lowest_merges(tokens, 2000, "average", search_dtype=dtype), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("many", [1, 1 << 60])
@pytest.mark.parametrize("number", range(9))
def test_all_candidates_hold_all_that_are_close(number, many, monkeypatch):
    monkeypatch.setattr(ranking, "_MANY_VALUES", many)
    monkeypatch.setattr(batches, "_BLOCK_ELEMENTS", 20_000)
    unit = unit_vectors(fields()[number])
    count = len(unit)
    batch = torch.stack((unit, unit.flip(0), unit.roll(1, 0)))
    place, image = torch.arange(3 * count) % count, torch.arange(3 * count) // count
    in_play = place < torch.tensor([count // 2, 0, 2 * count // 3])[image]
    columns = torch.where(in_play)[0]
    rows = columns[::3].contiguous()
    flat = batch.flatten(0, 1)
    exact = (flat[rows] @ flat.T).masked_fill_((apart(3, count) | ~in_play)[rows], -torch.inf)
    best = exact.amax(1)
    bound, row, column = all_candidates(batch.float(), rows, columns)
    assert (bound >= best).all()
    assert (row.diff() >= 0).all()
    found = torch.zeros_like(exact, dtype=torch.bool)
    found[row, column] = True
    assert found.sum() == len(row)  # no pair twice
    assert found.sum(1).max() <= MOST_CANDIDATES
    too_far = best - 6 * float32_error(unit.shape[1])
    close = exact >= too_far.unsqueeze(1)
    listed = found.any(1)
    assert found[listed][(exact >= best.unsqueeze(1))[listed]].all()
    assert close[found].all()
    assert (close[~listed].sum(1) > MOST_CANDIDATES).all()


def test_all_candidates_of_a_cluster_alone_are_known_to_be_none():
    bound, _, _ = all_candidates(torch.eye(4)[None], torch.tensor([2]), torch.tensor([2]))
    assert bound.tolist() == [-torch.inf]


@pytest.mark.parametrize("most", [1, 3, 1000])
@pytest.mark.parametrize("rows", [1, 700])
def test_close_to_largest(rows, most):
    values = torch.randint(0, 90, (rows, 3 * LANES), generator=torch.Generator().manual_seed(1))
    values = values.float()
    best, row, column = close_to_largest(values, 2.0, most)
    assert torch.equal(best, values.amax(1))
    close = values >= values.amax(1, keepdim=True) - 2
    expected = torch.where(close & (close.sum(1, keepdim=True) <= most))
    width = values.shape[1]
    assert torch.equal((row * width + column).sort().values, expected[0] * width + expected[1])
    assert (row.diff() >= 0).all()


@pytest.mark.parametrize("few", [20_000, 1 << 27])
@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_lists_or_none_change_no_bit(number, few, share, monkeypatch):
    image = fields()[number]
    tokens = torch.stack((image, image.flip(0)))
    monkeypatch.setattr(average, "_FEW_PRODUCTS", 0)
    count = max(1, round(share * len(image)))
    expected = lowest_merges(tokens, count, "average")
    monkeypatch.setattr(average, "_FEW_PRODUCTS", few)
    for one, other in zip(lowest_merges(tokens, count, "average"), expected, strict=True):
        assert torch.equal(one, other)


def test_number_of_parts_grows_like_the_root():
    expected = {1: 64, 2048: 64, 4096: 64, 4097: 128, 9216: 128, 16384: 128, 36864: 256}
    assert {count: parts_of(count) for count in expected} == expected
