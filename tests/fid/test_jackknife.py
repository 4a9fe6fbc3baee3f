from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from sd_tokenmerge.fid.distance import Gaussian, frechet_distance
from sd_tokenmerge.fid.jackknife import (
    Groups,
    class_of,
    frechet_replicates,
    jackknife_error,
    make_groups,
)


def names(num_classes: int, per_class: int) -> list[str]:
    return [f"{c}_{i}.png" for c in range(num_classes) for i in range(per_class)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("17_0.png", "17"),
        ("n01440764/ILSVRC2012_val_00000293.JPEG", "n01440764"),
        ("val/n01440764/x.JPEG", "val/n01440764"),
        ("ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val"),
        ("portrait.png", "portrait"),
    ],
)
def test_the_class_is_read_from_the_name(file: str, expected: str) -> None:
    assert class_of(file) == expected


def test_many_classes_are_deleted_whole() -> None:
    files = names(100, 2)
    groups = make_groups(files)
    assert groups is not None
    assert groups.by_class
    assert str(groups) == "20 groups of classes"
    assert groups.labels.bincount().tolist() == [10] * 20
    for first, second in zip(groups.labels[::2], groups.labels[1::2], strict=True):
        assert first == second
    # "10" is the eleventh class, not the second: numbers sort as numbers
    assert groups.labels[files.index("10_0.png")] == 10


def test_few_classes_are_spread_over_the_groups() -> None:
    groups = make_groups(names(4, 30))
    assert groups is not None
    assert not groups.by_class
    assert groups.labels.bincount().tolist() == [6] * 20
    per_group = groups.labels.view(4, 30)
    for row in per_group:
        assert row.bincount(minlength=20).min() >= 1


def test_too_few_images_have_no_groups() -> None:
    assert make_groups(names(39, 1)) is None
    assert make_groups(names(40, 1)) is not None
    assert make_groups([]) is None


@pytest.mark.parametrize(("num_images", "size"), [(60, 24), (60, 100)])
def test_replicates_are_the_distances_without_each_group(num_images: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, size, generator=generator, dtype=torch.float64) + 3
    other = torch.randn(80, size, generator=generator, dtype=torch.float64) * 1.5
    reference = Gaussian.from_features(other)
    groups = make_groups(names(num_images, 1))
    assert groups is not None
    fast = frechet_replicates(features, reference, groups)
    subsets = [features[groups.labels != group] for group in range(20)]
    subsets += [
        features[(groups.labels != group) & (groups.labels != (group + 1) % 20)]
        for group in range(20)
    ]
    for value, subset in zip(fast.tolist(), subsets, strict=True):
        slow = frechet_distance(Gaussian.from_features(subset), reference)
        assert value == pytest.approx(slow, rel=1e-7)


def single_groups(count: int) -> Groups:
    return Groups(torch.arange(count), count, by_class=False)


def replicates_of(statistic: Callable[[torch.Tensor], float], values: torch.Tensor) -> torch.Tensor:
    """A statistic of groups of one, by its definition."""
    every = range(len(values))
    without = [{i} for i in every] + [{i, (i + 1) % len(values)} for i in every]
    subsets = [values[[i for i in every if i not in deleted]] for deleted in without]
    return torch.tensor([statistic(subset) for subset in subsets], dtype=torch.float64)


def textbook_error(single: torch.Tensor) -> float:
    """The jackknife without a correction, for groups of equal size."""
    count = len(single)
    return float(((count - 1) / count * (single - single.mean()).square().sum()).sqrt())


def test_error_of_a_mean_is_the_textbook_one() -> None:
    # for the mean, the delete-one jackknife is exactly s / sqrt(n), and there are no pairs
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    replicates = replicates_of(lambda x: float(x.mean()), values)
    error = jackknife_error(float(values.mean()), replicates, single_groups(50))
    assert error == pytest.approx(float(values.std()) / 50**0.5, rel=1e-9)


def test_error_without_second_differences_is_the_usual_formula_whatever_the_value() -> None:
    single = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value in (0.0, 7.0):
        double = (19 * (single + single.roll(-1)) - 20 * value) / 18
        error = jackknife_error(value, torch.cat([single, double]), single_groups(20))
        assert error == pytest.approx(textbook_error(single))


def test_error_of_a_sum_over_pairs_is_not_overstated() -> None:
    # |mean|^2 of vectors around zero: the jackknife alone says 1.4 times the true deviation
    generator = torch.Generator().manual_seed(0)
    values, textbook, errors = [], [], []
    for _ in range(400):
        vectors = torch.randn(20, 30, generator=generator, dtype=torch.float64)
        value = float(vectors.mean(0).square().sum())
        replicates = replicates_of(lambda x: float(x.mean(0).square().sum()), vectors)
        values.append(value)
        textbook.append(textbook_error(replicates[:20]))
        errors.append(jackknife_error(value, replicates, single_groups(20)))
    true = float(torch.tensor(values).std())
    ratios = [
        float(torch.tensor(kind).square().mean().sqrt()) / true for kind in (textbook, errors)
    ]
    assert ratios[0] > 1.3
    assert ratios[1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("num_images", "shift", "corrected"),
    [
        (200, 0.0, 1.2),  # pairs alone: the floor applies half of the time
        (200, 0.5, 1.0),
        (200, 2.0, 1.0),  # nearly a sum over images
        (190, 0.5, 1.0),  # groups of 9 and 10
    ],
)
def test_variance_of_a_sum_over_pairs(num_images: int, shift: float, corrected: float) -> None:
    # mean x.y over pairs of different images, as KID is of a kernel: a U-statistic of degree two
    size = 64
    by_image, by_pair = 4 * shift**2 / num_images, 2 * size / num_images**2  # true variances
    generator = torch.Generator().manual_seed(0)
    groups = Groups(torch.arange(num_images) % 20, 20, by_class=False)
    member = torch.nn.functional.one_hot(groups.labels).double()
    kept = (~groups.deleted).double()
    count = kept @ member.sum(0)
    values, estimates = [], []
    for _ in range(1500):
        x = torch.randn(num_images, size, generator=generator, dtype=torch.float64)
        x[:, 0] += shift
        sums, squares = member.T @ x, member.T @ x.square().sum(1)
        value = float((x.sum(0).square().sum() - x.square().sum()) / num_images / (num_images - 1))
        replicates = ((kept @ sums).square().sum(1) - kept @ squares) / (count * (count - 1))
        values.append(value)
        errors = [jackknife_error(value, some, groups) for some in (replicates[:20], replicates)]
        estimates.append(torch.tensor(errors).double().square())
    ratios = torch.stack(estimates).mean(0) / torch.tensor(values).double().var()
    uncorrected = (by_image + 2 * by_pair) / (by_image + by_pair)
    assert ratios.tolist() == pytest.approx([uncorrected, corrected], rel=0.1)


def test_the_correction_takes_off_half_of_the_variance_at_most() -> None:
    single = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    double = 100 * torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = jackknife_error(0, torch.cat([single, double]), single_groups(20))
    assert error == pytest.approx(textbook_error(single) / 2**0.5)
    assert jackknife_error(0, single, single_groups(20)) == pytest.approx(textbook_error(single))


def test_a_bias_in_one_over_n_is_no_error() -> None:
    # 250 classes in 20 groups: 24 or 26 images each, and the distance depends on how many are left
    groups = make_groups(names(250, 2))
    assert groups is not None
    assert set(groups.sizes.tolist()) == {24, 26}
    left = (~groups.deleted).double() @ groups.sizes.double()
    replicates = 3 + 1000 / left
    assert jackknife_error(3 + 1000 / 500, replicates, groups) < 1e-9
    assert textbook_error(replicates[:20]) > 0.01


@dataclass
class Simulation:
    """Many generated sets of one population: how distances spread, and what the jackknife says."""

    size: int = 48
    num_images: int = 400
    num_sets: int = 600
    num_errors: int = 60
    shift: float = 0.3

    def run(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        scale = torch.arange(1, self.size + 1, dtype=torch.float64) ** -0.4

        def draw(count: int) -> torch.Tensor:
            shape = (count, self.size)
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        reference = Gaussian.from_features(draw(1000))
        groups = make_groups(names(self.num_images // 2, 2))
        assert groups is not None
        distances, differences, errors, paired_errors = [], [], [], []
        for index in range(self.num_sets):
            baseline = draw(self.num_images) * (1 + self.shift) + self.shift * scale
            merged = baseline * 1.05 + 0.1 * draw(self.num_images)
            fits = [Gaussian.from_features(x) for x in (baseline, merged)]
            a, b = (frechet_distance(fit, reference) for fit in fits)
            distances.append(a)
            differences.append(b - a)
            if index < self.num_errors:
                first = frechet_replicates(baseline, reference, groups)
                second = frechet_replicates(merged, reference, groups)
                errors.append(jackknife_error(a, first, groups))
                paired_errors.append(jackknife_error(b - a, second - first, groups))
        spread, paired_spread = (
            float(torch.tensor(values).std()) for values in (distances, differences)
        )
        return {
            "error": float(torch.tensor(errors).mean()) / spread,
            "paired error": float(torch.tensor(paired_errors).mean()) / paired_spread,
            "gain of pairing": spread / paired_spread,
        }


def test_error_is_within_ten_per_cent_of_the_true_one() -> None:
    ratios = Simulation().run()
    assert ratios["error"] == pytest.approx(1, abs=0.1)
    assert ratios["paired error"] == pytest.approx(1, abs=0.1)
    assert ratios["gain of pairing"] > 2


def test_error_is_within_ten_per_cent_for_equal_populations() -> None:
    # at its minimum the distance has no slope, and pairs of images make half of its variance
    ratios = Simulation(shift=0.0).run()
    assert ratios["error"] == pytest.approx(1, abs=0.1)
    assert ratios["paired error"] == pytest.approx(1, abs=0.1)


def test_replicates_refuse_values_that_are_not_finite() -> None:
    features = torch.randn(60, 4)
    features[3] = torch.nan
    groups = make_groups(names(60, 1))
    assert groups is not None
    with pytest.raises(ValueError, match="must be finite"):
        frechet_replicates(features, Gaussian.from_features(torch.randn(9, 4)), groups)
