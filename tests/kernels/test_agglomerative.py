"""Agglomerative clustering against SciPy, and what its labels may depend on."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge.kernels import complete, exact, rounds, search, single, vectors
from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels, lowest_merges
from sd_tokenmerge.kernels.exact import unit_vectors
from tests.kernels.token_fields import smooth_tokens, white_tokens
from tests.reference import agglomerative as reference
from tests.reference.sets import as_sets

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "partitions.npz"
DTYPES = (torch.float32, torch.bfloat16)

linkages = pytest.mark.parametrize("linkage", LINKAGES)


@contextmanager
def searching(dtype: torch.dtype, *, in_groups: bool = True):
    """Search in `dtype`, with few tokens too if `in_groups`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "search_dtype", lambda device: dtype)
        if in_groups:
            patch.setattr(search, "_FEW_PRODUCTS", 0)
        yield


def assert_equal_to_scipy(tokens: torch.Tensor, num_clusters: int, linkage: str) -> None:
    labels = agglomerative_labels(tokens, num_clusters, linkage)
    for image, found in zip(tokens, labels, strict=True):
        expected = reference.agglomerative_labels(image.numpy(), num_clusters, linkage)
        np.testing.assert_array_equal(found.numpy(), expected)


def assert_as_good_as_scipy(tokens, num_clusters: int, linkage: str) -> None:
    """Under ties: exactly K clusters, by merges of the same heights."""
    count = tokens.shape[1]
    labels = agglomerative_labels(tokens, num_clusters, linkage)
    for image, found in zip(tokens, labels, strict=True):
        assert found.unique().tolist() == list(range(num_clusters))
        if num_clusters < count:
            merges = lowest_merges(image, num_clusters, linkage)
            assert torch.equal(merges.labels(count), found)
            distances = reference.cosine_distances(image.numpy())
            steps = list(zip(*(field.tolist() for field in merges), strict=True))
            heights = reference.heights(distances, steps, linkage)
            np.testing.assert_allclose(heights, merges.height.numpy(), atol=1e-12)
            expected = reference.scipy_tree(image.numpy(), linkage)[: len(steps), 2]
            np.testing.assert_allclose(heights, expected, atol=1e-12)


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
    channels = draw(st.integers(1, 64))
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


random_cases = given(cases(), st.sampled_from(LINKAGES), st.sampled_from(DTYPES), st.booleans())


def check_random_case(case, linkage, dtype, in_groups):
    tokens, num_clusters = case
    with searching(dtype, in_groups=in_groups):
        check = assert_equal_to_scipy if tokens.shape[2] > 1 else assert_as_good_as_scipy
        check(tokens, num_clusters, linkage)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@random_cases
@pytest.mark.timeout(300)
def test_random_cases_are_those_of_scipy(case, linkage, dtype, in_groups):
    check_random_case(case, linkage, dtype, in_groups)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, derandomize=True, database=None)
@random_cases
@pytest.mark.timeout(1800)
def test_many_random_cases_are_those_of_scipy(case, linkage, dtype, in_groups):
    check_random_case(case, linkage, dtype, in_groups)


def mixed_batch() -> torch.Tensor:
    """Three images of 600 tokens: smooth, white, and with ties."""
    tied = torch.cat((white_tokens(200, 24).repeat(2, 1), torch.zeros(50, 24)))
    tied = torch.cat((tied, white_tokens(150, 24, seed=5)))
    return torch.stack((smooth_tokens(20, 30, 24, seed=1), white_tokens(600, 24), tied))


@linkages
@pytest.mark.parametrize("num_clusters", [30, 300, 540])
def test_an_image_does_not_depend_on_the_others(linkage, num_clusters):
    tokens = mixed_batch()
    together = agglomerative_labels(tokens, num_clusters, linkage)
    for image in range(3):
        alone = agglomerative_labels(tokens[image : image + 1], num_clusters, linkage)
        assert torch.equal(alone[0], together[image])
    order = [2, 0, 1, 1]
    assert torch.equal(agglomerative_labels(tokens[order], num_clusters, linkage), together[order])


@linkages
def test_tokens_stored_channel_by_channel_are_clustered_row_by_row(linkage):
    tokens = mixed_batch()
    by_channel = tokens.mT.contiguous().mT
    assert not by_channel.is_contiguous()
    assert unit_vectors(by_channel[0]).is_contiguous()
    assert torch.equal(
        agglomerative_labels(by_channel, 300, linkage), agglomerative_labels(tokens, 300, linkage)
    )


@linkages
@pytest.mark.parametrize("image", range(3))
def test_blocks_threads_and_search_dtype_change_no_bit(linkage, image, monkeypatch):
    tokens = mixed_batch()[image]
    expected = lowest_merges(tokens, 60, linkage)

    def check():
        for found, wanted in zip(lowest_merges(tokens, 60, linkage), expected, strict=True):
            assert torch.equal(found, wanted)

    for dtype in DTYPES:
        for in_groups in (True, False):
            with searching(dtype, in_groups=in_groups):
                check()
        with searching(dtype), monkeypatch.context() as patch:
            patch.setattr(search, "_num_groups", lambda count: 19)
            patch.setattr(search, "_GROUPS_LISTED", 2)
            patch.setattr(search, "_BLOCK_ELEMENTS", 5000)
            patch.setattr(search, "_ROWS_LISTED_AT_ONCE", 50)
            patch.setattr(search, "_GATHERED_ROWS", 7)
            patch.setattr(search, "_WIDE", 30)
            patch.setattr(exact, "_BLOCK_ELEMENTS", 3000)
            patch.setattr(vectors, "_BLOCK_ROWS", 50)
            for module in (rounds, single):
                patch.setattr(module, "_PAIR_ELEMENTS", 700)
            patch.setattr(complete, "_BLOCK_ELEMENTS", 3000)
            patch.setattr(complete, "_WASTE", 1.0 if dtype == torch.float32 else 3.0)
            check()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        check()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("no"), MemoryError()])
def test_complete_linkage_states_the_bytes_that_it_cannot_have(error, monkeypatch):
    tokens = torch.eye(2).repeat(1, 50, 1)  # 50 pairs at distance 0 are merged first
    empty = torch.empty

    def refuse(*size, **options):
        if size[0] == size[1] == 50:
            raise error
        return empty(*size, **options)

    monkeypatch.setattr(complete.torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"100 tokens needs a matrix of 10,000 bytes on cpu"):
        agglomerative_labels(tokens, 10, "complete")


@pytest.mark.parametrize("case", ["smooth", "white", "ties", "all zero", "all equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deep_cuts_of_complete_linkage_have_the_heights_of_scipy(case, dtype):
    some = dict(zip(("smooth", "white", "ties"), mixed_batch(), strict=True))
    tokens = some.get(case, torch.zeros(300, 8) if case == "all zero" else torch.ones(300, 8))
    with searching(dtype):
        merges = lowest_merges(tokens, 3, "complete")
    tree = reference.scipy_tree(tokens.numpy(), "complete")
    np.testing.assert_allclose(merges.height.numpy(), tree[: len(tokens) - 3, 2], atol=1e-12)


@linkages
def test_float32_at_reduced_precision_and_autocast_change_no_bit(linkage):
    tokens = mixed_batch()
    expected = agglomerative_labels(tokens, 200, linkage)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(agglomerative_labels(tokens, 200, linkage), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(agglomerative_labels(tokens, 200, linkage), expected)


@linkages
def test_the_order_of_tokens_and_channels_and_the_scale_of_tokens_do_not_matter(linkage):
    tokens = smooth_tokens(20, 25, 20)
    expected = as_sets(agglomerative_labels(tokens[None], 150, linkage)[0].tolist())
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(500, generator=generator)
    found = agglomerative_labels(tokens[None, order], 150, linkage)[0]
    assert as_sets(found[order.argsort()].tolist()) == expected
    scaled = tokens[:, torch.randperm(20)] * (torch.rand(500, 1, generator=generator) + 0.1)
    assert as_sets(agglomerative_labels(scaled[None], 150, linkage)[0].tolist()) == expected


@linkages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(linkage, dtype):
    tokens = smooth_tokens(12, 15, 30)[None].to(dtype)
    assert_equal_to_scipy(tokens.double(), 70, linkage)
    labels = agglomerative_labels(tokens, 70, linkage)
    assert torch.equal(labels, agglomerative_labels(tokens.double(), 70, linkage))
    assert labels.dtype == torch.int64


@linkages
@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_few_tokens(linkage, num_tokens):
    tokens = torch.tensor([[1.0, 0], [0, 1], [0.1, 1]])[None, :num_tokens]
    for num_clusters in range(1, num_tokens + 1):
        assert_equal_to_scipy(tokens, num_clusters, linkage)


def test_an_empty_batch_has_no_labels():
    assert agglomerative_labels(torch.zeros(0, 5, 3), 2, "average").shape == (0, 5)


def test_gradients_are_left_alone():
    tokens = white_tokens(30, 4)[None].requires_grad_()
    labels = agglomerative_labels(tokens, 10, "average")
    assert not labels.requires_grad
    with torch.inference_mode():
        assert torch.equal(agglomerative_labels(tokens, 10, "average"), labels)


@linkages
def test_works_inside_a_compiled_function(linkage):
    def double(tokens):
        return agglomerative_labels(tokens * 2, 20, linkage) * 2

    tokens = smooth_tokens(8, 9, 12)[None]
    torch._dynamo.reset()
    compiled = torch.compile(double, backend="aot_eager")
    assert torch.equal(compiled(tokens), double(tokens))


@pytest.mark.parametrize(
    ("tokens", "num_clusters", "linkage", "error", "message"),
    [
        (torch.zeros(5, 3), 2, "single", ValueError, r"`tokens` must be \[B, N, C\]"),
        (torch.zeros(1, 0, 3), 1, "single", ValueError, r"got \[1, 0, 3\]"),
        (torch.zeros(1, 5, 0), 1, "single", ValueError, r"got \[1, 5, 0\]"),
        (torch.zeros(1, 5, 3).int(), 2, "single", TypeError, "got torch.int32"),
        (torch.zeros(1, 5, 3), 0, "single", ValueError, r"must be in \[1, 5\], got 0"),
        (torch.zeros(1, 5, 3), 6, "single", ValueError, r"must be in \[1, 5\], got 6"),
        (
            torch.zeros(1, 5, 3),
            2,
            "ward",
            ValueError,
            "single, complete, average, got 'ward'",
        ),
        (torch.full((1, 5, 3), torch.nan), 2, "single", ValueError, "must be finite"),
        (torch.full((1, 5, 3), torch.inf), 2, "complete", ValueError, "must be finite"),
    ],
)
def test_refuses_bad_arguments(tokens, num_clusters, linkage, error, message):
    with pytest.raises(error, match=message):
        agglomerative_labels(tokens, num_clusters, linkage)


SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@linkages
@pytest.mark.parametrize("channels", [40, 320])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0])
def test_4096_tokens_at_every_keep_rate(linkage, channels, sigma):
    if sigma:
        tokens = smooth_tokens(64, 64, channels, sigma, seed=channels)
    else:
        tokens = white_tokens(4096, channels, seed=channels)
    tree = reference.scipy_tree(tokens.numpy(), linkage)
    for keep in SWEEP:
        num_clusters = round(4096 * keep)
        expected = reference.cut(tree, num_clusters)
        for dtype in DTYPES:
            with searching(dtype, in_groups=False):
                labels = agglomerative_labels(tokens[None], num_clusters, linkage)[0]
            np.testing.assert_array_equal(labels.numpy(), expected)
