"""The benchmark of memory: what a trace says, where it is taken, and a run on a tiny model."""

from __future__ import annotations

import argparse

import bench_memory
import pytest
import render_benchmarks
import torch
from bench_memory import FIELDS
from bench_rows import append_rows
from memory_trace import MemoryTrace, Span, trace_memory, watched
from pipeline_contestants import CONTESTANTS
from timed_unet import QUICK_CONFIG, QUICK_LATENT, TimedUNet
from torch import nn

from sd_tokenmerge.sites import find_sites

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_is_of_what_is_alive_together():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(2**18)

    def together():
        return [torch.empty(2**18) for _ in range(3)]

    assert MIB <= trace_memory(one_after_the_other, CPU).peak < 1.1 * MIB
    assert 3 * MIB <= trace_memory(together, CPU).peak < 3.1 * MIB


def test_growth_is_beyond_what_was_alive():
    spans = [Span("self-attention:a", 15, 35), Span("self-attention:b", 45, 60)]
    trace = MemoryTrace([10, 20, 30, 40, 50], [100, 130, 110, 200, 215], spans)
    assert trace.attention == 30
    assert trace.peak == 215


def test_the_peak_is_in_the_innermost_module():
    spans = [Span("module:", 0, 100), Span("module:a.b", 20, 40), Span("module:a", 15, 60)]
    assert MemoryTrace([10, 30, 50], [1, 3, 2], spans).peak_module == "a.b"
    assert MemoryTrace([10, 30, 50], [1, 2, 3], spans).peak_module == "a"
    assert MemoryTrace([10, 30, 50], [1, 2, 3], []).peak_module == ""
    assert MemoryTrace([], [], []).peak_module == ""


def test_modules_are_watched_and_then_not():
    class Wasteful(nn.Module):
        def forward(self, x):
            return x + torch.zeros(4 * MIB)[0]

    model = nn.Sequential(nn.Identity(), Wasteful(), nn.Identity())
    with watched(model, []):
        trace = trace_memory(lambda: model(torch.ones(1)), CPU)
    assert trace.peak_module == "1"
    assert trace.peak >= 16 * MIB
    assert all(not module._forward_hooks for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def calls():
    return TimedUNet(QUICK_CONFIG, QUICK_LATENT, 2, "cpu", "float32")


def test_only_the_merged_level_is_watched(calls):
    trace = bench_memory.measure(calls, CONTESTANTS["unpatched"])
    finest = [site.path for site in find_sites(calls.unet) if site.level == 0]
    names = [span.name for span in trace.spans if span.name.startswith("self-attention:")]
    assert names == [f"self-attention:{path}" for path in finest]
    assert 0 < trace.attention < trace.peak


def test_choosing_is_counted(calls):
    """An N x N matrix of distances, of one image at a time, is within what is watched."""
    matrix = (QUICK_LATENT**2) ** 2 * 4
    assert bench_memory.measure(calls, CONTESTANTS["unpatched"]).attention < matrix
    assert bench_memory.measure(calls, CONTESTANTS["atc-complete-50"]).attention > matrix


def test_rows_are_made_and_shown(calls, tmp_path, capsys):
    names = ["unpatched", "oracle-qkv-50"]
    rows = bench_memory.rows(calls, "quick", argparse.Namespace(contestants=names, dtype="float32"))
    assert [row["contestant"] for row in rows] == names
    assert all(row.keys() == set(FIELDS) for row in rows)
    assert "oracle-qkv-50" in capsys.readouterr().out
    rows[0] |= {"peak_mib": "30.4", "attention_mib": "8.0", "peak_in": "up_blocks.0"}
    rows[1] |= {"peak_mib": "30.4", "attention_mib": "6.0", "peak_in": "up_blocks.0"}
    append_rows(tmp_path / "memory.csv", FIELDS, rows)
    text = render_benchmarks.memory(tmp_path)
    assert "| unpatched | 8 | 1.00 | 30, in `up_blocks.0` |" in text
    assert "| oracle-qkv-50 | 6 | 0.75 | 30, in `up_blocks.0` |" in text
