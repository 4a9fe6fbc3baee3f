"""The search must never claim more than it knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sd_tokenmerge.kernels import search
from sd_tokenmerge.kernels.exact import unit_vectors
from sd_tokenmerge.kernels.search import (
    Lists,
    _CoarseProduct,
    float32_error,
    list_largest,
    mutual_lists,
    nearest_lists,
    precise_dtype,
)
from tests.kernels.test_agglomerative import DTYPES, searching
from tests.kernels.token_fields import smooth_tokens, white_tokens


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
    for in_groups in (True, False):
        with searching(dtype, in_groups=in_groups):
            check(mutual_lists(unit.float()), unit, unit, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("count", [1, 30, 200])
def test_lists_of_some_rows(number, dtype, count):
    unit = unit_vectors(fields()[number])
    some = torch.randperm(len(unit), generator=torch.Generator().manual_seed(count))[:count]
    own = torch.arange(len(unit)) == some.unsqueeze(1)
    for in_groups in (True, False):
        with searching(dtype, in_groups=in_groups):
            lists = nearest_lists(unit.float(), some, torch.arange(len(unit)))
        check(lists, unit[some], unit, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(9))
def test_lists_of_some_rows_among_some_columns(number, dtype):
    unit = unit_vectors(fields()[number])
    columns = torch.arange(0, len(unit), 2) if number % 2 else torch.arange(5, len(unit))
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(number))
    rows = columns[order[:150]]
    everyone = torch.arange(len(unit))
    left_out = ~torch.isin(everyone, columns) | (everyone == rows.unsqueeze(1))
    for in_groups in (True, False):
        with searching(dtype, in_groups=in_groups):
            check(nearest_lists(unit.float(), rows, columns), unit[rows], unit, left_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 100, 300, 1000])
def test_lists_leave_out_the_own_component(dtype, num_tokens):
    unit = unit_vectors(white_tokens(num_tokens, 16))
    component = torch.arange(num_tokens) // 3 % 40
    everyone = torch.arange(num_tokens)
    for in_groups in (True, False):
        with searching(dtype, in_groups=in_groups):
            lists = nearest_lists(unit.float(), everyone, everyone, component)
        check(lists, unit, unit, component == component.unsqueeze(1))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 100, 512, 513, 1000, 4097])
def test_the_largest_values_of_a_row(count):
    values = torch.rand(20, count, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lists = list_largest(values.clone(), 0.0)
    listed = lists.value > -torch.inf
    assert (listed.sum(1) == min(count, search.LIST_LENGTH)).all()
    torch.testing.assert_close(values.gather(1, lists.column)[listed], lists.value[listed])
    rest = values.scatter(1, lists.column, -torch.inf)
    assert (rest.amax(1) <= lists.bound).all()
    assert ((lists.value.amax(1) - values.amax(1)).abs() < 2.0**-10).all()


@pytest.mark.parametrize("channels", [1, 2, 17, 320, 1280])
def test_bfloat16_stays_within_its_bound(channels):
    # values just off the middle between two bfloat16 numbers round by the largest amount
    step = torch.randint(0, 3, (900, channels), generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1 + 2.0**-8 + 2.0**-12, 1 + 3 * 2.0**-8 - 2.0**-12, 1.0])[step]
    unit = unit_vectors(tokens)
    everyone = torch.arange(len(unit))
    with searching(torch.bfloat16):
        coarse = _CoarseProduct(unit.float(), everyone)
    exact = (unit @ unit.T).fill_diagonal_(-torch.inf)
    exact = torch.nn.functional.pad(exact, (0, -len(unit) % coarse.groups), value=-torch.inf)
    exact = exact.view(len(unit), -1, coarse.groups).amax(1)
    for maxima in (coarse.maxima(everyone, None), coarse.mutual_maxima()):
        assert (exact <= coarse.upper_bound(maxima)).all()


def test_values_are_float64_where_torch_multiplies_float32_less_precisely():
    assert precise_dtype(torch.device("cpu")) == torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert precise_dtype(torch.device("cpu")) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
