"""Unit vectors on demand against all of them at once."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.kernels.exact import pair_similarities, unit_vectors
from sd_tokenmerge.kernels.unit_rows import UnitRows
from tests.kernels.token_fields import white_tokens


@pytest.mark.parametrize("channels", [37, 137])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20, 1e-38, 3e37])
def test_rows_and_similarities_are_those_of_unit_vectors(dtype, scale, by_channel, channels):
    if dtype == torch.float16 and scale != 1.0:
        pytest.skip("out of float16's range")
    tokens = (white_tokens(1100, channels) * scale).to(dtype)
    tokens[5] = 0
    if by_channel:
        tokens = tokens.T.contiguous().T
    unit, rows = unit_vectors(tokens), UnitRows(tokens)
    left, right = torch.randint(1100, (2, 4000), generator=torch.Generator().manual_seed(1))
    assert len(rows) == 1100
    assert torch.equal(rows.exact(left), unit[left])
    assert torch.equal(rows.rounded(torch.float32), unit.float())
    assert torch.equal(rows.rounded(torch.bfloat16), unit.float().bfloat16())
    exact = pair_similarities(unit[left], unit[right])
    assert torch.equal(rows.similarities(left, right), exact)
    assert (rows.quick_similarities(left, right) - exact).abs().max() <= rows.error


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_refuses_what_is_not_finite(value, dtype):
    tokens = white_tokens(9, 3).to(dtype)
    tokens[7, 1] = value
    with pytest.raises(ValueError, match="`tokens` must be finite"):
        UnitRows(tokens)
