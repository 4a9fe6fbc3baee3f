from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.fid.manifold import Manifold, compare_manifolds, neighbour_distances


def slow_manifold(fake: torch.Tensor, real: torch.Tensor, k: int, k_density: int) -> Manifold:
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).double().square().sum().sqrt())

    def radius(x: torch.Tensor, i: int, neighbours: int) -> float:
        others = sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)
        return others[neighbours - 1]

    real_radii = [radius(real, i, k) for i in range(len(real))]
    fake_radii = [radius(fake, i, k) for i in range(len(fake))]
    dense_radii = [radius(real, i, k_density) for i in range(len(real))]
    precision = [
        any(distance(f, r) <= d for r, d in zip(real, real_radii, strict=True)) for f in fake
    ]
    recall = [any(distance(r, f) <= d for f, d in zip(fake, fake_radii, strict=True)) for r in real]
    balls = [distance(f, r) <= d for f in fake for r, d in zip(real, dense_radii, strict=True)]
    covered = [
        any(distance(f, r) <= d for f in fake) for r, d in zip(real, dense_radii, strict=True)
    ]
    return Manifold(
        sum(precision) / len(fake),
        sum(recall) / len(real),
        sum(balls) / (k_density * len(fake)),
        sum(covered) / len(real),
    )


@pytest.mark.parametrize("block", [512, 7])
def test_they_are_their_definitions(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_tokenmerge.fid.manifold._BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(30, 4, generator=generator) * 1.2 + 0.5
    real = torch.randn(24, 4, generator=generator)
    ours = compare_manifolds(fake, real)
    slow = slow_manifold(fake, real, 3, 5)
    assert 0.2 < ours.precision < 1
    assert 0.2 < ours.recall < 1
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(ours, name) == pytest.approx(getattr(slow, name), abs=1e-12)


def test_equal_and_distant_sets() -> None:
    real = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    same = compare_manifolds(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert compare_manifolds(real + 100, real) == Manifold(0, 0, 0, 0)


def test_one_mode_is_precise_but_does_not_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 100, 3, generator=generator)
    real = torch.cat([modes[0], modes[1] + 50])
    fake = torch.randn(100, 3, generator=generator)
    result = compare_manifolds(fake, real)
    assert result.precision > 0.9
    assert result.recall < 0.6
    assert result.coverage < 0.6


def test_an_image_is_not_its_own_neighbour() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    expected = [[1, 3], [1, 2], [2, 3], [4, 6]]
    assert neighbour_distances(points, 2).tolist() == expected


def test_small_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be in \[1, 4\] for sets of 9 and 5 images"):
        compare_manifolds(torch.randn(9, 2), torch.randn(5, 2))
    with pytest.raises(ValueError, match="same number of features"):
        compare_manifolds(torch.randn(9, 2), torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"must be in \[1, 8\]"):
        compare_manifolds(torch.randn(9, 2), torch.randn(9, 2), k_precision=0)
