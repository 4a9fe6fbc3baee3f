"""The search must never claim more than it knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import unit_vectors
from sd_tokenmerge.kernels.images import lists_by_image
from sd_tokenmerge.kernels.nearest import mutual_nearest_lists, nearest_lists
from sd_tokenmerge.kernels.parts import Columns
from sd_tokenmerge.kernels.search import (
    Lists,
    float32_error,
    precise_dtype,
)
from tests.kernels.token_fields import smooth_tokens, white_tokens

DTYPES = (torch.float32, torch.bfloat16)


def check(lists: Lists, rows: Tensor, columns: Tensor, left_out: Tensor) -> None:
    """Listed values are right, and everything else is at most the bound."""
    exact = (rows @ columns.T).masked_fill(left_out, -torch.inf)
    error = float32_error(rows.shape[1])
    listed = lists.value > -torch.inf
    values = exact.gather(1, lists.column)
    torch.testing.assert_close(values[listed].float(), lists.value[listed], atol=error, rtol=0)
    row, place = torch.where(listed)
    exact[row, lists.column[row, place]] = -torch.inf
    assert (exact.amax(1) <= lists.bound).all()
    keys = row * len(columns) + lists.column[row, place]
    assert len(keys.unique()) == len(keys)  # no column twice


def fields() -> list[Tensor]:
    return [
        white_tokens(300, 2),
        white_tokens(1500, 40),
        smooth_tokens(40, 30, 64),
        smooth_tokens(24, 24, 320, sigma=6.0),
        -white_tokens(700, 8).abs() * torch.tensor([[1.0, -1.0]]).repeat(700, 4),
        torch.eye(400),
        torch.ones(500, 16),
        torch.zeros(300, 4),
        torch.cat((white_tokens(1, 32).repeat(150, 1), white_tokens(400, 32))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_lists_of_all_rows_among_themselves(number, dtype):
    unit = unit_vectors(fields()[number])
    own = torch.eye(len(unit), dtype=torch.bool)
    check(mutual_nearest_lists(unit.float(), dtype), unit, unit, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("count", [1, 30, 200])
def test_lists_of_some_rows(number, dtype, count):
    unit = unit_vectors(fields()[number])
    some = torch.randperm(len(unit), generator=torch.Generator().manual_seed(count))[:count]
    own = torch.arange(len(unit)) == some.unsqueeze(1)
    check(nearest_lists(unit.float(), some, None, some, dtype), unit[some], unit, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_lists_of_some_rows_among_some_columns(number, dtype):
    unit = unit_vectors(fields()[number])
    columns = torch.arange(0, len(unit), 2) if number % 2 else torch.arange(5, len(unit))
    own = torch.randperm(len(columns), generator=torch.Generator().manual_seed(number))[:150]
    lists = nearest_lists(unit.float(), columns[own], columns, own, dtype)
    left_out = torch.arange(len(columns)) == own.unsqueeze(1)
    check(lists, unit[columns[own]], unit[columns], left_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [3, 100, 300, 1000])
def test_lists_leave_out_the_own_group(dtype, num_columns):
    unit = unit_vectors(white_tokens(num_columns, 16))
    groups = torch.arange(num_columns) // 3 % 40
    lists = nearest_lists(unit.float(), torch.arange(num_columns), None, groups, dtype, groups)
    check(lists, unit, unit, groups == groups.unsqueeze(1))


@pytest.mark.parametrize("number", range(9))
def test_lists_within_the_images_of_a_batch(number):
    unit = unit_vectors(fields()[number])
    count, half = len(unit), len(unit) // 2
    batch = torch.stack((unit, unit.flip(0), unit.roll(1, 0)))
    total = 3 * count
    image = torch.arange(total) // count
    apart = (image != image.unsqueeze(1)) | torch.eye(total, dtype=torch.bool)
    # some, all and none of an image's tokens
    in_play = torch.arange(total) % count < torch.tensor([half, count, 0]).repeat_interleave(count)
    columns = torch.where(in_play)[0]
    rows = columns[:: 7 if number % 2 else 1].contiguous()
    lists = lists_by_image(batch.float(), rows, columns)
    left_out = apart | ~in_play
    check(lists, batch.flatten(0, 1)[rows], batch.flatten(0, 1), left_out[rows])


@pytest.mark.parametrize("channels", [1, 2, 17, 320, 1280])
def test_bfloat16_stays_within_its_bound(channels):
    # values just off the middle between two bfloat16 numbers round by the largest amount
    step = torch.randint(0, 3, (900, channels), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1 + 2.0**-8 + 2.0**-12, 1 + 3 * 2.0**-8 - 2.0**-12, 1.0])[step]
    unit = unit_vectors(tokens)
    columns = Columns(unit.float(), None, None, torch.bfloat16)
    own = torch.arange(len(unit))
    exact = torch.nn.functional.pad(
        (unit @ unit.T).fill_diagonal_(-torch.inf), (0, columns.padding)
    ).view(len(unit), columns.parts, columns.width)
    for maxima in (columns.part_maxima(own, own), columns.mutual_part_maxima()):
        assert (exact.amax(2) <= columns._upper_bound(maxima.double())).all()


def test_values_are_float64_where_torch_multiplies_float32_less_precisely():
    assert precise_dtype(torch.device("cpu")) == torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert precise_dtype(torch.device("cpu")) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
