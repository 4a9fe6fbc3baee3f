"""The benchmark of UNet calls: contestants, the gate, a round on a tiny model, and the tables."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from benchmarks import unet
from benchmarks.cases import QUICK, build
from benchmarks.contestants import CONTESTANTS, oracle_of
from benchmarks.rows import append_rows

from sd_tokenmerge import PRESETS, apply_patch
from sd_tokenmerge.bench.calls import timed_step
from sd_tokenmerge.bench.contestants import Contestant, Precomputed
from sd_tokenmerge.bench.gate import UnsoundError, require_sound
from tests.tiny_models import call_unet, tiny_unet


@pytest.fixture
def calls():
    return build(QUICK, batch=1)


def test_contestants_know_how_long_partitions_are_kept():
    kept = {name: CONTESTANTS[name].refresh_every for name in CONTESTANTS}
    assert kept["preset-fast"] == PRESETS["fast"].refresh_every
    assert (kept["atc-keys-50-refresh-10"], kept["tomesd-50"], kept["unpatched"]) == (10, 1, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_its_oracle(name):
    bound, preset = CONTESTANTS[oracle_of(f"preset-{name}")].config, PRESETS[name]
    for option in ("merge", "keep_rate", "weights_keys"):
        assert getattr(bound, option) == getattr(preset, option)


def test_the_oracle_chooses_once_and_merges():
    model, oracle = tiny_unet(), Precomputed()
    plain = call_unet(model)
    with apply_patch(model, oracle, keep_rate=0.5) as handle:
        merged = call_unet(model)
        row = handle.report().rows[0]
    assert (row.tokens_before, row.tokens_after) == (256, 128)
    assert not torch.allclose(plain, merged, atol=1e-3)
    tokens = torch.zeros(2, 256, 4)
    assert oracle(tokens, 128) is oracle(tokens, 128)
    assert oracle(tokens, 128).check().num_clusters == 128


def test_kept_partitions_are_averaged_over_their_life():
    class Calls:
        def timesteps(self):
            return range(50)

        def timed(self, step):
            return {10: (5.0, 6.0), 11: (2.0, 1.0)}[step]

    step, costs = timed_step(Calls(), 4)
    assert step == ((5 + 3 * 2) / 4, (6 + 3 * 1) / 4)
    assert costs == [(5, 6), (2, 1)]
    assert timed_step(Calls(), 1) == ((5, 6), [(5, 6)])


@pytest.mark.parametrize("benchmark", [unet.STEP, unet.SELF_ATTENTION])
def test_a_round_on_a_tiny_model(calls, benchmark):
    names = ["unpatched", "oracle-qkv-50", "preset-fast", "tomesd-50"]
    contestants = [CONTESTANTS[name] for name in names]
    require_sound(calls, contestants)
    rows = unet.measure(benchmark, calls, contestants, 0, 1)
    assert [row["contestant"] for row in rows] == names
    for row in rows:
        assert {*row, "case"} == set(unet.COLUMNS)
        assert row["repeats"] == ("2" if row["contestant"] == "unpatched" else "1")
        assert float(row["step_ms"]) > 0
        assert bool(row["kept_ms"]) == (int(row["refresh_every"]) > 1)


@dataclass(frozen=True)
class Faulty(Contestant):
    @contextmanager
    def on(self, model):
        hook = model.conv_out.register_forward_hook(lambda *call: call[-1] * math.nan)
        if self.name == "messy":
            model.conv_out.bias.data += 1
        if self.name != "broken":
            hook.remove()
        yield
        hook.remove()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("idle", "idle: merging did nothing"),
        ("messy", "messy: removing the patch does not restore"),
        ("broken", "broken: the output is not finite"),
    ],
)
def test_the_gate_stops_what_is_wrong(calls, name, message):
    with pytest.raises(UnsoundError, match=message):
        require_sound(calls, [Faulty(name)])


def rows_of(benchmark, speedups, **changes):
    row = dict.fromkeys(unet.COLUMNS, "1") | {"benchmark": benchmark, "case": "sd15-512"}
    row |= {"device": "a CPU", "kept_ms": "", **changes}
    return [{**row, "contestant": name, "speedup": str(one)} for name, one in speedups.items()]


def test_times(tmp_path):
    speedups = {"unpatched": 1, "oracle-qkv-50": 4, "tomesd-50": 1.25, "preset-fast": 2}
    rows = rows_of(unet.STEP, {"tomesd-50": 5}) + rows_of(unet.STEP, speedups, step_ms="1000")
    append_rows(tmp_path / "unet.csv", unet.COLUMNS, rows)
    text = unet.step_times(tmp_path)
    assert "Batch 1; a CPU, 1 thread, torch 1, commit 1." in text
    assert "| turns | tomesd-50 | oracle-qkv-50 | preset-fast |" in text
    # in parentheses, the share of choosing clusters; the oracle of `preset-fast` is not there
    assert "| sd15-512 | 1 | 1.00 | 1 | 1.25x (69 %) | 4.00x | 2.00x |" in text
    assert text.count("tomesd-50") == 1  # the last row counts
    assert unet.self_attention_times(tmp_path) == "Not run."


def test_settings_stand_beside_the_oracles_of_their_run():
    runs = {
        "first": {"unpatched": 1, "oracle-qkv-50": 3, "atc-keys-50": 2.5},
        "second": {"unpatched": 1, "oracle-qkv-50": 1.25, "atc-keys-50": 0.9, "tomesd-50": 1.1},
        "third": {"unpatched": 1, "oracle-qkv-50": 2, "tomesd-50": 1.6, "preset-fast": 1.8},
    }
    rows = [row for commit in runs for row in rows_of(unet.STEP, runs[commit], commit=commit)]
    second, third = unet.times_table(rows).split("\n\nBatch 1")
    assert "commit second." in second
    assert "| oracle-qkv-50 | atc-keys-50 |" in second
    assert "| 1.25x | 0.90x (28 %) |" in second
    assert "| oracle-qkv-50 | tomesd-50 | preset-fast |" in third
    assert "| 2.00x | 1.60x (20 %) | 1.80x |" in third
