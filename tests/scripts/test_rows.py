"""The store of rows, and tables in general."""

from __future__ import annotations

import pytest
from benchmarks.markdown import counted, latest, number, plus_minus
from benchmarks.rows import MACHINE, STORE, append_rows, describe_machine, read_rows


def test_rows_are_appended_and_read(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    append_rows(path, ("a", "b"), [{"a": 1, "b": "x, y"}])
    append_rows(path, ("a", "b"), [{"a": 2}])
    assert read_rows(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    assert read_rows(tmp_path / "other.csv") == []


def test_other_columns_are_refused(tmp_path):
    append_rows(tmp_path / "rows.csv", ("a",), [{"a": 1}])
    with pytest.raises(ValueError, match="must have the columns"):
        append_rows(tmp_path / "rows.csv", ("a", "b"), [{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match="fields not in"):
        append_rows(tmp_path / "rows.csv", ("a",), [{"c": 1}])


def test_the_machine_is_described():
    row = describe_machine("cpu", commit="abc")
    assert tuple(row) == MACHINE
    assert row["commit"] == "abc"
    assert all(row.values())


@pytest.mark.parametrize("path", sorted(STORE.glob("*.csv")), ids=lambda path: path.name)
def test_committed_rows_say_where_they_were_measured(path):
    rows = read_rows(path)
    assert rows
    if path.name != "quality_images.csv":  # its rows belong to those of quality.csv
        assert tuple(rows[0])[-len(MACHINE) :] == MACHINE
        assert all(row["device"] and row["commit"] for row in rows)


def test_cells():
    assert [counted(count, "turn") for count in ("1", 2)] == ["1 turn", "2 turns"]
    assert [number("1.256", 2), number("", 2)] == ["1.26", "-"]
    row = {"value": "1.25", "error": "0.5", "none": ""}
    assert plus_minus(row, "value", "error", 1) == "1.2 ± 0.5"
    assert plus_minus(row, "value", "none", 1) == "1.2"


def test_the_last_row_of_a_key_counts():
    rows = [{"k": "a", "v": "1"}, {"k": "b", "v": "2"}, {"k": "a", "v": "3"}]
    assert latest(rows, ("k",)) == [{"k": "a", "v": "3"}, {"k": "b", "v": "2"}]
