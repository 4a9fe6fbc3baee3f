"""Ranking the values of a row."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels.ranking import at_least, clear, largest, lowest_of, two_largest
from tests.kernels.token_fields import white_tokens

widths = pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 127, 128, 129, 200, 512])


@widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_two_largest(width, dtype):
    values = (1000 * white_tokens(50, width)).to(dtype)
    ranked = two_largest(values)
    assert torch.equal(ranked.best, values.amax(1))
    assert torch.equal(values.gather(1, ranked.column.unsqueeze(1)).squeeze(1), ranked.best)
    rest = values.scatter(1, ranked.column.unsqueeze(1), lowest_of(dtype))
    assert torch.equal(ranked.second, rest.amax(1))


@widths
def test_values_at_least_a_threshold(width):
    values = white_tokens(40, width)
    threshold = values.amax(1) - 0.7
    threshold[::5] = torch.inf
    row, column = at_least(values, two_largest(values), threshold)
    found = torch.zeros_like(values, dtype=torch.bool).index_put((row, column), torch.tensor(True))
    assert torch.equal(found, values >= threshold.unsqueeze(1))
    assert len(row) == found.sum()


@pytest.mark.parametrize("count", [1, 3])
def test_largest_and_the_rest(count):
    values = white_tokens(30, 9)
    ordered, columns = values.sort(descending=True)
    best, column, rest = largest(values.clone(), count)
    assert torch.equal(best, ordered[:, :count])
    assert torch.equal(column, columns[:, :count])
    assert torch.equal(rest, ordered[:, count])


def test_clear_one_value_of_each_row():
    values = white_tokens(3, 4)
    cleared = values.clone()
    clear(cleared, torch.tensor([3, 0, 1]))
    assert (cleared == -torch.inf).nonzero().tolist() == [[0, 3], [1, 0], [2, 1]]
    assert torch.equal(cleared.isfinite().sum(1), torch.tensor([3, 3, 3]))
