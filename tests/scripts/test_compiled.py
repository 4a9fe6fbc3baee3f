"""The benchmark of compiled models: a run on a tiny model, its gate, and the table."""

from __future__ import annotations

import pytest
import torch
from benchmarks import compiled
from benchmarks.cases import CASES, QUICK, SAMPLE, build
from benchmarks.contestants import CONTESTANTS
from benchmarks.rows import MACHINE, append_rows


def test_settings_are_known():
    assert set(compiled.DEFAULT) <= CONTESTANTS.keys()
    longest = max(CONTESTANTS[name].refresh_every for name in compiled.DEFAULT)
    assert longest < compiled.GENERATION
    assert CASES["sample-512"].config == SAMPLE
    assert SAMPLE.is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_model(monkeypatch):
    calls = build(QUICK, batch=1)
    one = CONTESTANTS["atc-keys-50-refresh-10"]
    row = compiled.measure(calls, one, 0, 1)
    assert {*row, "case", *MACHINE} == set(compiled.COLUMNS)
    assert (row["graphs"], row["recompilations"], row["repeats"]) == ("1", "0", "1")
    assert float(row["compile_s"]) > 0
    monkeypatch.setattr(torch, "compile", lambda unet, fullgraph: lambda *a, **k: [a[0]])
    with pytest.raises(SystemExit, match="atc-keys-50-refresh-10, compiled: off by"):
        compiled.measure(calls, one, 0, 1)


def test_the_table(tmp_path):
    row = dict.fromkeys(compiled.COLUMNS, "1") | {"device": "a CPU", "steps": "12"}
    rows = [
        {**row, "contestant": "unpatched", "compiled_speedup": "1.25"},
        {**row, "contestant": "oracle-qkv-50", "eager_speedup": "1.4", "compiled_speedup": "2.0"},
    ]
    append_rows(tmp_path / "compile.csv", compiled.COLUMNS, rows)
    text = compiled.compile_times(tmp_path)
    times, end = "1 (1 to 1)", "| 1 | 1 | 1 in 12 steps |"
    assert f"| unpatched | {times} | 1.00 | {times} | 1.25 | - {end}" in text
    assert f"| oracle-qkv-50 | {times} | 1.40 | {times} | 2.00 | 1.60 {end}" in text
