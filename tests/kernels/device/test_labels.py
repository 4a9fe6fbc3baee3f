"""Rounds of fixed shape against SciPy and against the rounds of the CPU, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge.kernels import agglomerative, exact
from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels
from sd_tokenmerge.kernels.device import complete, labels, rounds, search
from sd_tokenmerge.kernels.device.labels import fixed_shape_labels
from tests.kernels.test_agglomerative import mixed_batch
from tests.kernels.test_ties import CASES
from tests.kernels.token_fields import nearing_tokens, smooth_tokens, white_tokens
from tests.reference import agglomerative as reference

linkages = pytest.mark.parametrize("linkage", LINKAGES)


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 3))
    height = draw(st.integers(1, 14))
    width = draw(st.integers(2, 14))
    channels = draw(st.integers(2, 48))
    seed = draw(st.integers(0, 2**31))
    sigma = draw(st.sampled_from([0.0, 0.7, 1.5, 4.0]))
    tokens = [
        smooth_tokens(height, width, channels, sigma, seed + image)
        if sigma
        else white_tokens(height * width, channels, seed + image)
        for image in range(batch)
    ]
    return torch.stack(tokens), draw(st.integers(1, height * width - 1))


def check_random_case(case, linkage):
    tokens, num_clusters = case
    found = fixed_shape_labels(tokens, num_clusters, linkage)
    assert torch.equal(found, agglomerative_labels(tokens, num_clusters, linkage))
    for image, label in zip(tokens, found, strict=True):
        expected = reference.agglomerative_labels(image.numpy(), num_clusters, linkage)
        np.testing.assert_array_equal(label.numpy(), expected)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(cases(), st.sampled_from(LINKAGES))
def test_random_cases_are_those_of_scipy(case, linkage):
    check_random_case(case, linkage)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(cases(), st.sampled_from(LINKAGES))
@pytest.mark.timeout(1800)
def test_many_random_cases_are_those_of_scipy(case, linkage):
    check_random_case(case, linkage)


@linkages
@pytest.mark.parametrize("case", CASES)
def test_ties_are_resolved_as_on_the_cpu(case, linkage):
    tokens = CASES[case]
    count = len(tokens)
    for num_clusters in {1, 2, count // 4, count // 2, 3 * count // 4, count - 1}:
        expected = agglomerative_labels(tokens[None], num_clusters, linkage)
        assert torch.equal(fixed_shape_labels(tokens[None], num_clusters, linkage), expected)


@linkages
def test_near_ties_are_resolved_as_on_the_cpu(linkage):
    # equal up to scale and rounding, and up to what float32 can tell
    generator = torch.Generator().manual_seed(1)
    scaled = torch.arange(1.0, 61).unsqueeze(1) * white_tokens(1, 9)
    noise = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    tokens = torch.stack(
        (scaled.double(), scaled.double() + 1e-7 * noise, white_tokens(60, 9) + 1e-15 * noise)
    )
    for num_clusters in (1, 7, 30, 55):
        expected = agglomerative_labels(tokens, num_clusters, linkage)
        assert torch.equal(fixed_shape_labels(tokens, num_clusters, linkage), expected)


@linkages
@pytest.mark.parametrize("num_clusters", [30, 300, 540])
@pytest.mark.parametrize("at_once", [1, 3 * 600 * 24])
def test_an_image_does_not_depend_on_the_others(linkage, num_clusters, at_once, monkeypatch):
    tokens = mixed_batch()
    together = fixed_shape_labels(tokens, num_clusters, linkage)
    assert torch.equal(together, agglomerative_labels(tokens, num_clusters, linkage))
    order = [2, 0, 1, 1]
    monkeypatch.setattr(labels, "_NUMBERS_AT_ONCE", at_once)
    assert torch.equal(fixed_shape_labels(tokens[order], num_clusters, linkage), together[order])


@linkages
def test_blocks_lists_and_stop_tests_change_no_label(linkage, monkeypatch):
    tokens = mixed_batch()
    expected = fixed_shape_labels(tokens, 60, linkage)
    for numbers, length, between in ((1, 4, 1), (200_000, 1, 3), (1 << 24, 3, 7)):
        monkeypatch.setattr(rounds, "_BLOCK_NUMBERS", numbers)
        monkeypatch.setattr(search, "_LISTED", length)
        monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", 1 << 21 if numbers > 1 else 1)
        monkeypatch.setattr(rounds.FixedRounds, "rounds_between_tests", between)
        assert torch.equal(fixed_shape_labels(tokens, 60, linkage), expected)


@linkages
def test_float32_at_reduced_precision_changes_no_label(linkage):
    tokens = mixed_batch()
    expected = fixed_shape_labels(tokens, 200, linkage)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(fixed_shape_labels(tokens, 200, linkage), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@linkages
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_1500_tokens(linkage, sigma):
    tokens = smooth_tokens(30, 50, 40, sigma) if sigma else white_tokens(1500, 40)
    for num_clusters in (150, 750):
        found = fixed_shape_labels(tokens[None], num_clusters, linkage)
        assert torch.equal(found, agglomerative_labels(tokens[None], num_clusters, linkage))


@pytest.mark.slow
@pytest.mark.timeout(900)
@linkages
@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
def test_4096_tokens_of_320_channels(linkage, sigma):
    tokens = smooth_tokens(64, 64, 320, sigma) if sigma else white_tokens(4096, 320)
    for num_clusters in (205, 2048, 3687):
        found = fixed_shape_labels(tokens[None], num_clusters, linkage)
        assert torch.equal(found, agglomerative_labels(tokens[None], num_clusters, linkage))


@linkages
def test_a_chain_of_ever_nearer_neighbours_ends(linkage):
    tokens = nearing_tokens(100)
    for num_clusters in (1, 40):
        found = fixed_shape_labels(tokens[None], num_clusters, linkage)
        expected = reference.agglomerative_labels(tokens.numpy(), num_clusters, linkage)
        np.testing.assert_array_equal(found[0].numpy(), expected)


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(agglomerative, "needs_fixed_shapes", lambda tokens: True)
    called = []
    original = agglomerative.fixed_shape_labels

    def watched(tokens, num_clusters, linkage):
        called.append(linkage)
        return original(tokens, num_clusters, linkage)

    monkeypatch.setattr(agglomerative, "fixed_shape_labels", watched)
    return called


@linkages
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_devices_other_than_the_cpu_take_this_path(linkage, dtype, as_on_a_device):
    tokens = mixed_batch().to(dtype)
    found = agglomerative_labels(tokens, 250, linkage)
    assert as_on_a_device == [linkage]
    assert torch.equal(found, fixed_shape_labels(tokens.double(), 250, linkage))
    everyone = torch.arange(600).repeat(3, 1)
    assert torch.equal(agglomerative_labels(tokens, 600, linkage), everyone)
    assert agglomerative_labels(tokens[:0], 250, linkage).shape == (0, 600)
    with pytest.raises(ValueError, match="`tokens` must be finite"):
        agglomerative_labels(tokens * torch.nan, 250, linkage)


def test_where_the_matrix_does_not_fit_labels_are_found_without_one(as_on_a_device, monkeypatch):
    allocate = complete.allocate
    tokens = mixed_batch()
    expected = fixed_shape_labels(tokens, 250, "complete")
    monkeypatch.setattr(complete, "allocate", lambda _, like: allocate(1 << 24, like))
    with pytest.raises(MemoryError, match="2,251,799,813,685,248 bytes"):
        fixed_shape_labels(tokens, 250, "complete")
    assert torch.equal(agglomerative_labels(tokens, 250, "complete"), expected)
