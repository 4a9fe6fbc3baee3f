from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.fid.jackknife import jackknife_error, make_groups
from sd_tokenmerge.fid.kid import (
    kernel_distance,
    kernel_replicates,
    self_similarity,
    subset_kid,
)


def slow_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    same_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    same_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    cross = [kernel(a, b) for a in x for b in y]
    return sum(same_x) / len(same_x) + sum(same_y) / len(same_y) - 2 * sum(cross) / len(cross)


def sets(num_x: int = 45, num_y: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_x, 7, generator=generator)
    return x, torch.randn(num_y, 7, generator=generator) * 1.3 + 0.2


def test_all_pairs_are_counted_once() -> None:
    x, y = sets()
    assert kernel_distance(x, y) == pytest.approx(slow_kid(x, y), rel=1e-9)
    known = kernel_distance(x, y, reference_similarity=self_similarity(y))
    assert known == pytest.approx(kernel_distance(x, y), rel=1e-12)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets()
    groups = make_groups([f"{i}.png" for i in range(45)])
    assert groups is not None
    similarity = self_similarity(y)
    whole = kernel_distance(x, y)
    replicates = kernel_replicates(x, y, groups, reference_similarity=similarity)
    monkeypatch.setattr("sd_tokenmerge.fid.kid._BLOCK", 10)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-12)
    again = kernel_replicates(x, y, groups, reference_similarity=similarity)
    assert torch.allclose(again, replicates, rtol=1e-12)


def test_replicates_are_the_distances_without_each_group() -> None:
    x, y = sets()
    groups = make_groups([f"{i}.png" for i in range(45)])
    assert groups is not None
    fast = kernel_replicates(x, y, groups, reference_similarity=self_similarity(y))
    for value, deleted in zip(fast.tolist(), groups.deleted, strict=True):
        slow = slow_kid(x[~deleted[groups.labels]], y)
        assert value == pytest.approx(slow, rel=1e-9)


def test_it_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            kernel_distance(
                torch.randn(20, 5, generator=generator), torch.randn(30, 5, generator=generator)
            )
            for _ in range(400)
        ]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20
    assert 0.3 < float((values < 0).double().mean()) < 0.8


def test_subsets_are_those_of_torchmetrics_in_mean() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 7

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    x, y = sets(300, 300)
    with pytest.warns(UserWarning, match="memory"):
        metric = KernelInceptionDistance(feature=Identity(), subsets=100, subset_size=100)
    metric.update(y, real=True)
    metric.update(x, real=False)
    theirs, _ = metric.compute()
    ours = subset_kid(x, y, num_subsets=100, subset_size=100)
    assert ours.mean == pytest.approx(float(theirs), abs=4 * ours.std / 10)
    assert ours.mean == pytest.approx(kernel_distance(x, y), abs=4 * ours.std / 10)
    assert subset_kid(x, y, subset_size=100) == subset_kid(x, y, subset_size=100)


def test_subsets_of_everything_are_everything() -> None:
    x, y = sets(31, 31)
    result = subset_kid(x, y, num_subsets=3, subset_size=31)
    assert result.mean == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert result.std == pytest.approx(0, abs=1e-12)


def test_bad_arguments_are_refused() -> None:
    x, y = sets()
    with pytest.raises(ValueError, match=r"`subset_size` must be in \[2, 31\], got 1000"):
        subset_kid(x, y)
    with pytest.raises(ValueError, match="`num_subsets` must be at least 1"):
        subset_kid(x, y, subset_size=10, num_subsets=0)
    with pytest.raises(ValueError, match="same number of features, got 7 and 6"):
        kernel_distance(x, y[:, :6])
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(x[:1], y)
    with pytest.raises(ValueError, match="must be finite"):
        kernel_distance(x / 0, y)


def test_its_error_is_true_for_equal_populations() -> None:
    # all of its variance is of pairs there, but for what the reference set differs
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 5, generator=generator)
    similarity = self_similarity(reference)
    groups = make_groups([f"{i}_0.png" for i in range(100)])
    assert groups is not None
    values, errors = [], []
    for _ in range(500):
        x = torch.randn(100, 5, generator=generator)
        value = kernel_distance(x, reference, reference_similarity=similarity)
        replicates = kernel_replicates(x, reference, groups, reference_similarity=similarity)
        values.append(value)
        errors.append(jackknife_error(value, replicates, groups))
    error = float(torch.tensor(errors).square().mean().sqrt())
    assert error == pytest.approx(float(torch.tensor(values).std()), rel=0.15)
