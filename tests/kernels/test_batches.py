"""The searches of a batch, all images at once or one by one, claim no more than they know."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels import batches, images
from sd_tokenmerge.kernels.agglomerative import agglomerative_labels, lowest_merges
from sd_tokenmerge.kernels.batches import batch_lists, first_lists
from sd_tokenmerge.kernels.exact import unit_vectors
from sd_tokenmerge.kernels.parts import parts_of
from tests.kernels.test_search import DTYPES, check, fields
from tests.kernels.token_fields import smooth_tokens, white_tokens

SHORT = (0, 1 << 60)  # one by one, all at once


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


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_lists_of_some_rows_of_some_images(number, dtype, short, monkeypatch):
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    monkeypatch.setattr(batches, "_SHORT_PRODUCT", short)
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


@pytest.mark.parametrize("short", SHORT)
def test_large_images_together_are_clustered_like_each_alone(short, monkeypatch):
    batch = torch.stack((white_tokens(600, 12), smooth_tokens(20, 30, 12), torch.ones(600, 12)))
    alone = torch.cat([agglomerative_labels(image[None], 60, "average") for image in batch])
    monkeypatch.setattr(images, "_FEW_TOKENS", 0)
    monkeypatch.setattr(batches, "_SHORT_PRODUCT", short)
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


def test_number_of_parts_grows_like_the_root():
    expected = {1: 64, 2048: 64, 4096: 64, 4097: 128, 9216: 128, 16384: 128, 36864: 256}
    assert {count: parts_of(count) for count in expected} == expected
