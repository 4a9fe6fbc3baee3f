"""The benchmark of the FID evaluator: its simulations, and that each part is described."""

from __future__ import annotations

import bench_fid
import fid_errors
import pytest
import torch


def test_each_part_is_described():
    for name in bench_fid.BENCHMARKS:
        assert f"python scripts/bench_fid.py {name} " in bench_fid.__doc__


def test_populations_have_the_spectrum_of_a_power_law():
    features = fid_errors.population(4, 0)(20_000)
    expected = torch.arange(1, 5, dtype=torch.float64) ** -0.4
    torch.testing.assert_close(features.std(0), expected, rtol=0.03, atol=0)
    again, other = (fid_errors.population(4, seed)(20_000) for seed in (0, 1))
    assert torch.equal(again, features)
    assert not torch.equal(other, features)


def test_the_two_images_of_a_class_are_in_one_group():
    first, second = fid_errors.by_class(2000).labels.view(-1, 2).T
    assert torch.equal(first, second)
    assert len(first.unique()) > 1


def test_estimated_errors_are_those_of_simulated_sets():
    row = fid_errors._simulate(8, 100, 0.3, 400)
    assert (row["D"], row["N"], row["sets"]) == (8, 100, 400)
    assert float(row["ratio"]) == pytest.approx(1, abs=0.3)
    assert float(row["pairs: ratio"]) == pytest.approx(1, abs=0.3)
    assert row["jackknife"] / row["true SD"] == pytest.approx(float(row["ratio"]), abs=0.006)
    assert row["pairs: true SD"] < row["true SD"]
