"""The benchmark of memory: what a trace says, where it is taken, and a run on a tiny model."""

from __future__ import annotations

import pytest
import torch
from benchmarks import memory
from benchmarks.cases import QUICK, build
from benchmarks.contestants import CONTESTANTS
from benchmarks.memory_trace import MemoryTrace, Span, trace_memory, watched
from benchmarks.rows import MACHINE, append_rows
from torch import nn

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
    return build(QUICK)


def test_only_the_merged_level_is_watched(calls):
    trace = memory.trace_call(calls, CONTESTANTS["unpatched"])
    names = [span.name for span in trace.spans if span.name.startswith("self-attention:")]
    assert names == [f"self-attention:{index}" for index in range(3)]
    assert 0 < trace.attention < trace.peak


def test_choosing_is_counted(calls):
    unpatched, fresh = (
        memory.trace_call(calls, CONTESTANTS[name]).attention
        for name in ("unpatched", "preset-paper")
    )
    assert fresh > unpatched  # so few tokens that clustering needs more than attention


def test_rows_are_made_and_shown(calls, tmp_path):
    names = ["unpatched", "oracle-qkv-50"]
    rows = [memory.measure(calls, CONTESTANTS[name]) for name in names]
    assert all({*row, "case", *MACHINE} == set(memory.COLUMNS) for row in rows)
    rows[0] |= {"peak_mib": "30.4", "attention_mib": "8.0", "peak_in": "up_blocks.0"}
    rows[1] |= {"peak_mib": "30.4", "attention_mib": "6.0", "peak_in": "up_blocks.0"}
    for row, commit in zip(rows, ("ab", "cd"), strict=True):
        row |= dict.fromkeys(MACHINE, "1") | {"case": "sd15-512", "commit": commit}
    append_rows(tmp_path / "memory.csv", memory.COLUMNS, rows)
    text = memory.memory_use(tmp_path)
    assert "commit ab, cd." in text
    assert "| unpatched | 8 | 1.00 | 30 |" in text
    assert "| oracle-qkv-50 | 6 | 0.75 | 30 |" in text
