from __future__ import annotations

from dataclasses import replace

import pytest

from sd_tokenmerge.report.rows import (
    conditions_sentence,
    distance_name,
    keep_rates_of,
    merged_labels,
    require_comparable,
)
from tests.report.example import example_rows


@pytest.mark.parametrize(
    ("delta", "error", "expected"),
    [(0.41, 0.2, True), (-0.41, 0.2, True), (0.4, 0.2, False), (0.1, None, False)],
)
def test_significant_means_more_than_two_standard_errors(delta, error, expected):
    row = replace(example_rows()[1], delta=delta, delta_se=error)
    assert row.is_significant is expected


def test_order_of_methods_and_keep_rates():
    rows = example_rows()
    assert merged_labels(rows) == ["atc:linkage=single", "random"]
    assert keep_rates_of(rows) == [1, 0.7, 0.5, 0.4]


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


def test_conditions_are_one_sentence():
    assert conditions_sentence({"steps": "25", "device": "cpu"}) == "steps 25; device cpu."


def test_only_the_inception_distance_is_called_fid():
    assert distance_name(example_rows(extractor="inception")) == "FID"
    assert distance_name(example_rows()) == "Fréchet distance (efficientnet-lite0)"
    assert distance_name(example_rows(extractor=None)) == "FID"
