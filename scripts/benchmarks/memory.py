"""Memory of a UNet call, one call for each contestant.

    python scripts/bench.py memory                                     6 minutes
    python scripts/bench.py memory --cases sdxl-1024 --batch 1

Two numbers: the peak bytes of tensors in a call, beyond weights and inputs, with the module that
runs at the peak; and the largest growth around one self-attention at the merged level, choosing
clusters included. Merging changes the second; it changes the first only if the peak is in
self-attention. Calls use a new partition. Other load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.contestants import CONTESTANTS, UNPATCHED, Contestant
from benchmarks.markdown import MODEL, Row, case_tables, grouped, latest, number
from benchmarks.memory_trace import MemoryTrace, trace_memory, watched
from benchmarks.options import add_common_options, add_unet_options, build
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from benchmarks.unet_calls import UNetCalls
from sd_tokenmerge.bench.calls import finest_transformers
from sd_tokenmerge.bench.gate import require_sound

COLUMNS = (
    *("benchmark", "case", "contestant", "dtype", "batch"),
    *("peak_mib", "peak_in", "attention_mib"),
    *MACHINE,
)
DEFAULT = (
    *(UNPATCHED, "oracle-qkv-50", "tomesd-50", "preset-paper", "atc-keys-50"),
    *("tome-sd-50", "atc-complete-50", "preset-near-lossless", "preset-fast"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py memory`."""
    add_unet_options(parser, ["sd15-512", "sd15-768"], DEFAULT)
    add_common_options(parser)


def run(arguments: argparse.Namespace) -> str:
    """Measure every case, store the rows, return the table."""
    rows: list[dict[str, str]] = []
    for case in arguments.cases:
        calls = build(case, arguments)
        contestants = [CONTESTANTS[name] for name in arguments.contestants]
        require_sound(calls, contestants)
        found = [measure(calls, one) | {"case": case} for one in contestants]
        found = [row | describe_machine(arguments.device) for row in found]
        if not arguments.quick:
            append_rows(arguments.out / "memory.csv", COLUMNS, found)
        rows += found
        del calls
        gc.collect()
    return memory_table(rows)


def measure(calls: UNetCalls, one: Contestant) -> dict[str, str]:
    """The row of one contestant, without the case."""
    trace = trace_call(calls, one)
    return {
        "benchmark": "memory",
        "contestant": one.name,
        "dtype": str(calls.dtype).removeprefix("torch."),
        "batch": str(calls.batch),
        "peak_mib": f"{trace.peak / 2**20:.1f}",
        "peak_in": trace.peak_module,
        "attention_mib": f"{trace.attention / 2**20:.1f}",
    }


def trace_call(calls: UNetCalls, one: Contestant) -> MemoryTrace:
    """Memory during one call of a patched UNet."""
    sample, keywords = calls.inputs(calls.latent, calls.latent)
    timestep = calls.timesteps()[10]
    _, transformers = finest_transformers(calls.denoiser)
    blocks = [block for each in transformers for block in each.transformer_blocks]

    @torch.no_grad()
    def call() -> None:
        calls.denoiser(sample, timestep, **keywords)

    with one.on(calls.denoiser), watched(calls.denoiser, blocks):
        return trace_memory(call, calls.device)


def memory_use(folder: Path) -> str:
    """Peak memory by case and device."""
    return memory_table(read_rows(folder / "memory.csv"))


def memory_table(rows: list[Row]) -> str:
    """A table for each case and device."""
    groups = grouped(latest(rows, ("case", "contestant", *MODEL)), ("case", *MODEL))
    head = ["", "around a merged self-attention, MiB", "relative", "whole call, MiB"]
    return case_tables(groups, head, _lines)


def _lines(group: Sequence[Row]) -> Iterator[list[str]]:
    attention = {row["contestant"]: float(row["attention_mib"]) for row in group}
    for row in group:
        name, relative = row["contestant"], "-"
        if UNPATCHED in attention:
            relative = f"{attention[name] / attention[UNPATCHED]:.2f}"
        yield [name, f"{attention[name]:.0f}", relative, number(row["peak_mib"], 0)]
