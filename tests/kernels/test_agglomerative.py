"""Agglomerative clustering against SciPy, and what its labels may depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels
from tests.kernels.token_fields import smooth_tokens, white_tokens
from tests.reference import agglomerative as reference
from tests.reference.sets import as_sets

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "partitions.npz"
DTYPES = (torch.float32, torch.bfloat16)

linkages = pytest.mark.parametrize("linkage", LINKAGES)


def assert_equal_to_scipy(tokens: torch.Tensor, num_clusters: int, linkage: str, **options) -> None:
    labels = agglomerative_labels(tokens, num_clusters, linkage, **options)
    for image, found in zip(tokens, labels, strict=True):
        expected = reference.agglomerative_labels(image.numpy(), num_clusters, linkage)
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden/partitions.npz")
@linkages
@pytest.mark.parametrize("size", ["b2_h12_w12_c32", "b1_h8_w16_c20", "b2_h16_w16_c40"])
@pytest.mark.parametrize("keep", ["0.9", "0.7", "0.5", "0.4"])
def test_golden_partitions_of_scikit_learn(linkage, size, keep):
    golden = np.load(GOLDEN)
    expected = golden[f"{size}/keep{keep}/atc_{linkage}"]
    labels = agglomerative_labels(
        torch.from_numpy(golden[f"{size}/tokens"]), len(np.unique(expected[0])), linkage
    )
    for found, wanted in zip(labels.tolist(), expected.tolist(), strict=True):
        assert as_sets(found) == as_sets(wanted)


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 4))
    height = draw(st.sampled_from(range(1, 21)))
    width = draw(st.sampled_from(range(2 if height == 1 else 1, 31)))
    channels = draw(st.integers(2, 64))  # with one channel every distance is 0, 1 or 2: all ties
    seed = draw(st.integers(0, 2**31))
    sigma = draw(st.sampled_from([0.0, 0.7, 1.5, 4.0]))
    tokens = torch.stack(
        [
            smooth_tokens(height, width, channels, sigma, seed + image)
            if sigma
            else white_tokens(height * width, channels, seed + image)
            for image in range(batch)
        ]
    )
    return tokens, draw(st.integers(1, height * width))


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(cases(), st.sampled_from(LINKAGES), st.sampled_from(DTYPES))
@pytest.mark.timeout(600)
def test_random_cases_are_those_of_scipy(case, linkage, dtype):
    tokens, num_clusters = case
    assert_equal_to_scipy(tokens, num_clusters, linkage, search_dtype=dtype)
