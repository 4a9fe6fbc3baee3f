"""The benchmark of compiled models: its gate, its arithmetic, and a run on a tiny model."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import bench_compile
import pytest
import render_benchmarks
import torch
from bench_compile import FIELDS, Bench
from bench_rows import append_rows
from pipeline_contestants import CONTESTANTS, Contestant

from sd_tokenmerge import apply_patch


@pytest.fixture
def bench():
    values = {"device": "cpu", "dtype": "float32", "batch": 1, "rounds": 3, "configs": Path()}
    yield Bench("quick", argparse.Namespace(**values))
    torch._dynamo.reset()


def test_settings_are_known():
    assert set(bench_compile.DEFAULT) | set(bench_compile.QUICK_CONTESTANTS) <= CONTESTANTS.keys()
    longest = max(CONTESTANTS[name].refresh_every for name in bench_compile.DEFAULT)
    assert longest < bench_compile.GENERATION


def test_the_sample_model_is_at_hand():
    config = bench_compile.read_config(bench_compile.ROOT / "samples", "pipeline")
    assert config["sample_size"] == 32


def test_the_unpatched_model_has_the_same_weights(bench):
    unet, unpatched = bench.calls.unet, bench.unpatched
    pairs = zip(unet.parameters(), unpatched.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    timestep = torch.tensor(500)
    plain = bench.calls.call(timestep, 16, 16)
    with apply_patch(unet, "tome-sd"):
        assert not torch.equal(bench.calls.call(timestep, 16, 16), plain)
        assert torch.equal(bench.calls.call(timestep, 16, 16, unpatched), plain)


def test_the_gate_lets_pass_what_merges(bench):
    bench.check(CONTESTANTS["preset-balanced"])


@dataclass(frozen=True)
class Partly(Contestant):
    """Is patched only the first `times` times."""

    times: int = 0
    used: list = field(default_factory=list)

    @contextmanager
    def on(self, unet):
        self.used.append(True)
        if len(self.used) > self.times:
            yield
        else:
            with super().on(unet):
                yield


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, "partly did nothing"),
        (1, "partly, compiled, then patched: off by 1 of"),
        (2, "partly, patched, then compiled: off by 1 of"),
    ],
)
def test_the_gate_stops_what_is_bypassed(bench, times, message):
    with pytest.raises(SystemExit, match=message):
        bench.check(Partly("partly", {"method": "tome-sd"}, times=times))


def test_turns_are_averaged_over_the_life_of_a_partition(bench, monkeypatch):
    seconds = {bench.unpatched: 8.0, bench.calls.unet: 4.0, "compiled": 2.0}

    def timed(timestep, module):
        is_kept = timestep.storage_offset() == 11
        return seconds[module] / (2 if is_kept else 1)

    monkeypatch.setattr(bench.calls, "timed", timed)
    turns = bench.take_turns(CONTESTANTS["atc-keys-50-refresh-10"], "compiled", 1e9)
    assert turns == {
        "unpatched": [8.0] * 3,
        "eager": [(4 + 9 * 2) / 10] * 3,
        "compiled": [(2 + 9 * 1) / 10] * 3,
    }
    assert bench.take_turns(CONTESTANTS["tome-sd-50"], "compiled", 0)["eager"] == [4.0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_model(bench, capsys):
    row = bench.run(CONTESTANTS["atc-keys-50-refresh-10"], 0)
    assert row.keys() == set(FIELDS)
    assert (row["graphs"], row["recompilations"], row["repeats"]) == (1, 0, 1)
    assert float(row["compile_s"]) > 0
    assert "atc-keys-50-refresh-10" in capsys.readouterr().out


def test_rows_are_shown(tmp_path):
    row = dict.fromkeys(FIELDS, "1") | {"case": "sample-512", "device": "a CPU", "steps": "12"}
    rows = [
        {**row, "contestant": "unpatched", "compiled_speedup": "1.25"},
        {**row, "contestant": "oracle-qkv-50", "eager_speedup": "1.4", "compiled_speedup": "2.0"},
    ]
    append_rows(tmp_path / "compile.csv", FIELDS, rows)
    text = render_benchmarks.compiled(tmp_path)
    assert "**sample-512**, 1, batch 1; a CPU, 1 thread" in text
    times = "1 (1 to 1)"
    end = "| 1 | 1 | 1 in 12 steps |"
    assert f"| unpatched | {times} | 1.00 | {times} | 1.25 | - {end}" in text
    assert f"| oracle-qkv-50 | {times} | 1.40 | {times} | 2.00 | 1.60 {end}" in text
