"""Tests that `test_triton` runs with TRITON_INTERPRET=1; not collected otherwise."""

from __future__ import annotations

import os

import pytest
import torch

from sd_tokenmerge.kernels.segments import segment_sum, sort_by_label
from sd_tokenmerge.kernels.triton_segments import sum_sorted_segments
from tests.kernels.token_fields import white_tokens


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [3, 200])
def test_segment_sums_are_those_of_the_cpu_to_the_last_bit(dtype, channels):
    tokens = white_tokens(40, channels).to(dtype)
    labels = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(0))
    expected = segment_sum(tokens[None], labels[None], 11)[0]
    found = sum_sorted_segments(tokens, *sort_by_label(labels, 11), expected.dtype)
    assert torch.equal(found, expected)
