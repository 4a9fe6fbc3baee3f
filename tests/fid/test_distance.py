from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge.fid.distance import Gaussian, frechet_distance, rank_warning
from tests.reference.fid_distance import features_with, random_rotation, slow_frechet

D = 96


def spectrum(kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(D, dtype=torch.float64, generator=generator) + 0.1
    if kind == "ill-conditioned":
        values = values * torch.logspace(0, -12, D, dtype=torch.float64)
    if kind == "rank-deficient":
        values[D // 2 :] = 0
    return values


def distance_of_features(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Gaussian.from_features(a), Gaussian.from_features(b))


@pytest.mark.parametrize("route", ["statistics", "features"])
@pytest.mark.parametrize("kind", ["well-conditioned", "ill-conditioned", "rank-deficient"])
def test_commuting_covariances_have_a_closed_form(kind: str, route: str) -> None:
    rotation = random_rotation(D, 0)
    a, b = spectrum(kind, 1), spectrum(kind, 2)
    mean_a = torch.linspace(0, 1, D, dtype=torch.float64)
    mean_b = mean_a.flip(0) * 2
    exact = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    if route == "statistics":
        first = Gaussian.from_statistics(mean_a, (rotation * a) @ rotation.T)
        second = Gaussian.from_statistics(mean_b, (rotation * b) @ rotation.T)
        value = frechet_distance(first, second)
    else:
        value = distance_of_features(
            features_with(mean_a, a, rotation, 150), features_with(mean_b, b, rotation, 300)
        )
    assert abs(value - exact) < 1e-9 * exact


@pytest.mark.parametrize("kind", ["well-conditioned", "ill-conditioned", "rank-deficient"])
def test_identical_sets_are_at_distance_zero(kind: str) -> None:
    values, rotation = spectrum(kind, 1), random_rotation(D, 0)
    gaussian = Gaussian.from_statistics(values, (rotation * values) @ rotation.T)
    assert abs(frechet_distance(gaussian, gaussian)) < 1e-9 * gaussian.trace
    features = features_with(values, values, rotation, 200)
    fitted = Gaussian.from_features(features)
    assert abs(distance_of_features(features, features)) < 1e-9 * fitted.trace
    assert abs(frechet_distance(fitted, gaussian)) < 1e-9 * fitted.trace


def test_disjoint_supports_have_a_closed_form() -> None:
    rotation = random_rotation(D, 0)
    a, b = spectrum("well-conditioned", 1), spectrum("well-conditioned", 2)
    a[D // 2 :] = 0
    b[: D // 2] = 0
    mean = torch.zeros(D, dtype=torch.float64)
    exact = float(a.sum() + b.sum())
    from_statistics = frechet_distance(
        Gaussian.from_statistics(mean, (rotation * a) @ rotation.T),
        Gaussian.from_statistics(mean, (rotation * b) @ rotation.T),
    )
    from_features = distance_of_features(
        features_with(mean, a, rotation, 150), features_with(mean, b, rotation, 120)
    )
    assert abs(from_statistics - exact) < 1e-9 * exact
    assert abs(from_features - exact) < 1e-9 * exact


def test_two_dimensional_covariances_have_a_closed_form() -> None:
    # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for the 2x2 matrix M = S_a S_b
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    product = a @ b
    trace_root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    exact = float(a.trace() + b.trace() - 2 * trace_root)
    mean = torch.zeros(2, dtype=torch.float64)
    value = frechet_distance(Gaussian.from_statistics(mean, a), Gaussian.from_statistics(mean, b))
    assert value == pytest.approx(exact, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    num_a=st.integers(2, 60),
    num_b=st.integers(2, 60),
    size=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_features_and_their_statistics_agree(num_a: int, num_b: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_a, size, dtype=torch.float64, generator=generator)
    b = torch.randn(num_b, size, dtype=torch.float64, generator=generator) * 2 + 1
    value = distance_of_features(a, b)
    statistics = [
        Gaussian.from_statistics(x.mean(0), torch.cov(x.T).reshape(size, size)) for x in (a, b)
    ]
    scale = statistics[0].trace + statistics[1].trace + 1
    assert abs(value - frechet_distance(*statistics)) < 1e-9 * scale
    assert abs(value - distance_of_features(b, a)) < 1e-9 * scale
    assert value > -1e-9 * scale


def test_matrix_square_roots_agree_where_they_work() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 32, dtype=torch.float64, generator=generator)
    b = torch.randn(300, 32, dtype=torch.float64, generator=generator) @ random_rotation(32, 1) * 3
    expected = slow_frechet(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert distance_of_features(a, b) == pytest.approx(expected, rel=1e-9)


def test_torchmetrics_accumulator_agrees() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 48

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double()

    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 48, generator=generator)
    fake = torch.randn(200, 48, generator=generator) * 1.5 + 0.3
    metric = FrechetInceptionDistance(feature=Identity())
    for batch in real.split(64):
        metric.update(batch, real=True)
    for batch in fake.split(64):
        metric.update(batch, real=False)
    assert distance_of_features(real, fake) == pytest.approx(float(metric.compute()), rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    features = torch.randn(10, 4)
    features[7, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 10 rows, the first being row 7"):
        distance_of_features(torch.randn(10, 4), features)
    covariance = torch.eye(4)
    covariance[1, 1] = bad
    with pytest.raises(ValueError, match="must be finite"):
        Gaussian.from_statistics(torch.zeros(4), covariance)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        distance_of_features(torch.randn(1, 4), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"must be \[N, D\], got \[4\]"):
        Gaussian.from_features(torch.randn(4))
    with pytest.raises(ValueError, match="same number of features, got 4 and 5"):
        distance_of_features(torch.randn(5, 4), torch.randn(5, 5))
    with pytest.raises(ValueError, match=r"got \[4\] and \[4, 3\]"):
        Gaussian.from_statistics(torch.zeros(4), torch.zeros(4, 3))


def test_matrices_that_are_no_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian.from_statistics(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="positive semi-definite"):
        Gaussian.from_statistics(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_few_images_are_warned_about() -> None:
    few, many = (Gaussian.from_features(torch.randn(count, 8)) for count in (8, 9))
    assert str(rank_warning(few)).startswith("8 images are no more than the 8 features")
    assert rank_warning(many) is None


@pytest.mark.slow
def test_matrix_square_roots_agree_at_the_papers_size() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 2049, dtype=torch.float32) ** -0.35
    generated = torch.randn(2000, 2048, generator=generator) * scale
    reference = torch.randn(5000, 2048, generator=generator) * scale
    expected = slow_frechet(
        *(f(x.double()) for x in (reference, generated) for f in (lambda x: x.mean(0), _cov))
    )
    # the square root's own error
    assert distance_of_features(reference, generated) == pytest.approx(expected, rel=1e-5)


def _cov(x: torch.Tensor) -> torch.Tensor:
    return torch.cov(x.T)
