from __future__ import annotations

import pytest

from sd_tokenmerge.report.rows import (
    BASELINE,
    Conditions,
    SweepRow,
    baseline_of,
    distance_name,
    keep_rates_of,
    methods_of,
    require_comparable,
)
from tests.report.example import CONDITIONS, example_rows


@pytest.mark.parametrize("keep_rate", [0, -0.5, 1.01])
def test_a_keep_rate_outside_its_range_is_refused(keep_rate):
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\]"):
        SweepRow(method="atc", keep_rate=keep_rate)


def test_the_unmerged_pipeline_keeps_everything():
    with pytest.raises(
        ValueError, match=r"`keep_rate` must be 1 for the unmerged pipeline, got 0\.5"
    ):
        SweepRow(method=BASELINE, keep_rate=0.5)


def test_a_negative_standard_error_is_refused():
    with pytest.raises(ValueError, match="`delta_se` must not be negative, got -1"):
        SweepRow(method="atc", keep_rate=0.5, delta=1.0, delta_se=-1.0)


@pytest.mark.parametrize(
    ("delta", "error", "expected"),
    [(0.41, 0.2, True), (-0.41, 0.2, True), (0.4, 0.2, False), (0.1, None, False)],
)
def test_significant_means_more_than_two_standard_errors(delta, error, expected):
    row = SweepRow(method="atc", keep_rate=0.5, delta=delta, delta_se=error)
    assert row.is_significant is expected


def test_rows_survive_a_round_trip_through_a_dictionary():
    for row in example_rows():
        assert SweepRow.from_dict(row.as_dict()) == row
    with pytest.raises(ValueError, match="no field 'fidd'"):
        SweepRow.from_dict({"method": "atc", "keep_rate": 0.5, "fidd": 3.0})


def test_order_of_methods_and_keep_rates():
    rows = example_rows()
    assert methods_of(rows) == ["atc:linkage=single", "random"]
    assert keep_rates_of(rows) == [1, 0.7, 0.5, 0.4]
    assert baseline_of(rows) is rows[0]
    assert baseline_of(rows[1:]) is None
    with pytest.raises(ValueError, match="one unmerged row at most, got 2"):
        baseline_of([rows[0], rows[0]])


@pytest.mark.parametrize(
    ("field", "value"),
    [("extractor", "inception"), ("protocol", "pytorch-fid"), ("num_generated", 12)],
)
def test_rows_measured_differently_do_not_share_a_table(field, value):
    other = [row for row in example_rows(**{field: value}) if row.method == "random"]
    mixed = [row for row in example_rows() if row.method != "random"] + other
    with pytest.raises(ValueError, match=f"share one `{field}` to be comparable"):
        require_comparable(mixed)


def test_a_setting_may_not_occur_twice():
    rows = example_rows()
    with pytest.raises(ValueError, match="each setting once"):
        require_comparable([*rows, rows[-1]])
    with pytest.raises(ValueError, match="at least one row"):
        require_comparable([])


def test_conditions_name_everything_known_and_nothing_else():
    line = CONDITIONS.line()
    for part in ("N generated 240", "N reference 600", "efficientnet-lite0", "protocol atc"):
        assert part in line
    for part in ("some_pipeline", "device CPU", "size 256x256", "steps 25", "torch 2.13.0"):
        assert part in line
    assert Conditions(num_generated=2000).line() == "N generated 2,000."


def test_only_the_inception_distance_is_called_fid():
    assert distance_name("inception") == "FID"
    assert distance_name("efficientnet-lite0") == "Fréchet distance (efficientnet-lite0)"
