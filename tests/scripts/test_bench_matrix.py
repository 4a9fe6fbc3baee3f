"""The benchmark of every method: its cells, its arithmetic, and a run on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import render_benchmarks
from bench_matrix import FIELDS, FORMS, Cell, Matrix, cells, method_strings
from bench_rows import append_rows
from timed_unet import QUICK_CONFIG, QUICK_LATENT, TimedUNet

from sd_tokenmerge import METHODS, PRESETS, parse_method


def test_every_method_and_choice_is_there():
    names = method_strings()
    assert len(names) == len(set(names))
    assert {parse_method(name).name for name in names} == set(METHODS)
    assert {"atc", "atc:linkage=single", "atc:linkage=complete", "kmedoids:weighted=true"} <= {
        *names
    }


def test_forms_are_all_that_presets_have():
    forms = {replace(PRESETS[name], keep_rate=0.5, summary="") for name in PRESETS}
    assert forms == {replace(PRESETS[name], keep_rate=0.5, summary="") for name in FORMS}


def test_a_cell_overrides_its_preset():
    one = Cell("tome-sd", "balanced", 25).contestant
    assert one.name == "tome-sd/balanced/25"
    assert one.options == {"method": "tome-sd", "preset": "balanced", "keep_rate": 0.25}
    assert one.refresh_every == PRESETS["balanced"].refresh_every


def test_the_oracle_merges_as_the_form_does():
    assert Cell("oracle", "exact", 50).contestant.name == "oracle-qkv-50"
    assert Cell("oracle", "balanced", 10).contestant.name == "oracle-kv-10"


@pytest.fixture(scope="module")
def matrix():
    calls = TimedUNet(QUICK_CONFIG, QUICK_LATENT, 1, "cpu", "float32")
    return Matrix(calls, "quick", cells(["oracle", "atc", "tome"], [50, 25]))


def test_a_round_on_a_tiny_model(matrix, tmp_path, capsys):
    matrix.check()
    rows = matrix.run(0, 1)
    assert len(rows) == len(FORMS) * 2 * 3
    assert "atc/balanced/25" in capsys.readouterr().out
    for row in rows:
        assert row.keys() <= set(FIELDS)
        is_refused = row["method"] == "tome" and row["keep"] == 25
        assert bool(row["refused"]) == is_refused
        assert row["repeats"] == (0 if is_refused else 1)
        assert is_refused or float(row["relative"]) > 0
    append_rows(tmp_path / "matrix.csv", FIELDS, rows)
    text = render_benchmarks.matrix(tmp_path)
    assert "| method | exact, 50 % | exact, 25 % | balanced, 50 % | balanced, 25 % |" in text
    line = next(line for line in text.splitlines() if line.startswith("| `tome`"))
    assert [cell.strip() == "refused" for cell in line.split("|")[2:-1]] == [False, True] * 2
    assert "1 turn per cell" in text


def test_the_gate_is_shut_for_what_does_nothing():
    calls = TimedUNet(QUICK_CONFIG, QUICK_LATENT, 1, "cpu", "float32")
    with pytest.raises(SystemExit, match="atc/exact/100 did nothing"):
        Matrix(calls, "quick", [Cell("atc", "exact", 100)]).check()
