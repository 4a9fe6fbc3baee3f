"""What every method promises, checked for every entry of `METHODS`."""

from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.methods import METHODS, Grid, Method, parse_method
from sd_tokenmerge.partitions import clusters_to_keep
from tests.methods.variants import VARIANTS, random_tokens, run
from tests.mps_operators import MissingOnMPS

GRIDS = [Grid(6, 6), Grid(4, 9), Grid(5, 3, 3)]

every_method = pytest.mark.parametrize("method", VARIANTS, ids=str)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def reachable(method: Method, grid: Grid) -> list[int]:
    """Numbers of clusters from all tokens down to the fewest that the method can do."""
    asked = {clusters_to_keep(grid.num_tokens, rate) for rate in (1.0, 0.9, 0.5, 0.3)}
    fewest = method.smallest_num_clusters(grid)
    return sorted({max(number, fewest) for number in asked} | {fewest}, reverse=True)


def test_every_method_is_tested():
    assert {type(method) for method in VARIANTS} == set(METHODS.values())


@every_method
def test_the_string_reads_back(method):
    assert parse_method(str(method)) == method


@every_grid
@pytest.mark.parametrize("batch", [1, 3])
@every_method
def test_exactly_k_clusters_all_in_use(method, batch, grid):
    tokens = random_tokens(batch, grid)
    for num_clusters in reachable(method, grid):
        result = run(method, tokens, num_clusters, grid)
        assert result.num_clusters == num_clusters
        assert result.labels.shape == (batch, grid.num_tokens)
        assert result.labels.dtype == torch.int64
        for row in result.labels:
            assert row.unique().tolist() == list(range(num_clusters))
        assert (result.representatives is not None) == method.has_representatives
        if result.representatives is not None:
            assert result.representatives.shape == (batch, num_clusters)
            assert result.representatives.dtype == torch.int64


@every_grid
@every_method
def test_all_tokens_kept_is_the_identity(method, grid):
    tokens = random_tokens(2, grid)
    result = run(method, tokens, grid.num_tokens, grid)
    assert torch.equal(result.labels, torch.arange(grid.num_tokens).expand(2, -1))
    assert torch.equal(result.merge(tokens), tokens)


@every_grid
@every_method
def test_an_image_does_not_see_its_batch(method, grid):
    tokens = random_tokens(3, grid)
    order = [2, 0, 1]
    for num_clusters in reachable(method, grid):
        together = run(method, tokens, num_clusters, grid).labels
        shuffled = run(method, tokens[order], num_clusters, grid).labels
        assert torch.equal(shuffled, together[order])
        for image in range(3):
            alone = run(method, tokens[image : image + 1], num_clusters, grid).labels
            assert torch.equal(alone[0], together[image])


@every_grid
@every_method
def test_how_tokens_are_stored_changes_nothing(method, grid):
    tokens = random_tokens(2, grid, channels=40)
    by_channel = tokens.transpose(1, 2).contiguous().transpose(1, 2)  # as a UNet's blocks do
    for num_clusters in reachable(method, grid):
        labels = run(method, tokens, num_clusters, grid).labels
        assert torch.equal(run(method, by_channel, num_clusters, grid).labels, labels)


@every_method
def test_only_the_seed_decides(method):
    grid = GRIDS[0]
    tokens = random_tokens(2, grid)
    num_clusters = reachable(method, grid)[1]
    state = torch.get_rng_state()
    first = run(method, tokens, num_clusters, grid, seed=1).labels
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(99)
    assert torch.equal(run(method, tokens, num_clusters, grid, seed=1).labels, first)
    other = run(method, tokens, num_clusters, grid, seed=2).labels
    assert torch.equal(other, first) == (not method.uses_seed)


@every_method
def test_half_precision_is_computed_in_float32(method):
    grid = GRIDS[1]
    for dtype in (torch.bfloat16, torch.float16):
        tokens = random_tokens(2, grid).to(dtype)
        for num_clusters in reachable(method, grid):
            half = run(method, tokens, num_clusters, grid).labels
            assert torch.equal(half, run(method, tokens.float(), num_clusters, grid).labels)


@every_method
def test_autocast_changes_nothing(method):
    grid = GRIDS[2]
    tokens = random_tokens(2, grid, channels=64)
    for num_clusters in reachable(method, grid):
        plain = run(method, tokens, num_clusters, grid).labels
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(run(method, tokens, num_clusters, grid).labels, plain)


@every_method
def test_the_tokens_are_left_alone_and_no_gradient_is_kept(method):
    grid = GRIDS[0]
    tokens = random_tokens(2, grid).requires_grad_()
    before = tokens.detach().clone()
    result = run(method, tokens, reachable(method, grid)[1], grid)
    assert torch.equal(tokens.detach(), before)
    result.merge(tokens).sum().backward()
    assert torch.isfinite(tokens.grad).all()


TIES = {
    "zero": lambda grid: torch.zeros(1, grid.num_tokens, 4),
    "equal": lambda grid: torch.full((1, grid.num_tokens, 4), 0.3),
    "duplicates": lambda grid: random_tokens(1, grid, 4)[:, torch.arange(grid.num_tokens) // 3],
    "interleaved": lambda grid: random_tokens(1, grid, 4)[:, torch.arange(grid.num_tokens) % 2],
    "one channel": lambda grid: random_tokens(1, grid, 1).sign(),
    "zero among others": lambda grid: (
        random_tokens(1, grid, 4) * (torch.arange(grid.num_tokens) % 3 > 0)[None, :, None]
    ),
    "tiny": lambda grid: random_tokens(1, grid, 4) * 1e-30,
    "large": lambda grid: random_tokens(1, grid, 4) * 1e37,
}


@pytest.mark.parametrize("ties", TIES)
@every_method
def test_ties_and_extremes_are_harmless(method, ties):
    grid = GRIDS[2]
    tokens = TIES[ties](grid)
    for num_clusters in reachable(method, grid):
        result = run(method, tokens, num_clusters, grid)
        assert torch.isfinite(result.merge(tokens)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@every_method
def test_broken_activations_neither_hang_nor_crash_a_denoiser(method, value):
    grid = GRIDS[1]
    tokens = random_tokens(3, grid)
    tokens[0, 5] = value
    tokens[1] = value
    scores = torch.rand(3, grid.num_tokens) if method.uses_scores else None
    for num_clusters in reachable(method, grid):
        method(tokens, num_clusters, grid=grid, scores=scores).check()


@every_grid
@every_method
def test_out_of_reach_is_refused(method, grid):
    tokens = random_tokens(1, grid)
    fewest = method.smallest_num_clusters(grid)
    for num_clusters in (fewest - 1, grid.num_tokens + 1):
        with pytest.raises(ValueError, match=rf"\[{fewest}, {grid.num_tokens}\].*{num_clusters}"):
            run(method, tokens, num_clusters, grid)
        with pytest.raises(ValueError, match="`num_clusters`"):
            method(tokens, num_clusters, grid=grid, scores=tokens[..., 0].abs())


@every_method
def test_one_token_is_one_cluster(method):
    result = run(method, torch.ones(2, 1, 3), 1, Grid(1, 1))
    assert result.labels.tolist() == [[0], [0]]


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.name != "atc"], ids=str)
def test_apple_gpus_have_all_operators(method):
    # ATC is computed on the CPU there.
    grid = GRIDS[0]
    with MissingOnMPS() as operators:
        run(method, random_tokens(2, grid), 20, grid)
    assert not operators.missing


@every_method
def test_missing_scores_are_refused(method):
    grid = GRIDS[0]
    tokens = random_tokens(1, grid)
    if method.uses_scores:
        with pytest.raises(ValueError, match="`scores` must be given"):
            method(tokens, 30, grid=grid)
    else:
        ignored = torch.full((1, grid.num_tokens), torch.nan)
        result = method(tokens, 30, grid=grid, scores=ignored)
        assert torch.equal(result.labels, method(tokens, 30, grid=grid).labels)
