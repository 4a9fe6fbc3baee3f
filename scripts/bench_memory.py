"""Memory of a UNet call, on the real architectures with random weights: one call each.

    python scripts/bench_memory.py                    # SD 1.5 at 512 and 768 px on a CPU
    python scripts/bench_memory.py --cases sdxl-1024 --batch 1
    python scripts/bench_memory.py --quick            # a tiny model: does it run?

Two numbers: the most bytes of tensors alive at a time in a call, beyond weights and inputs, with
the module that runs at that moment; and the most by which they grow around one self-attention at
the merged level, choosing clusters included. Merging changes the second; it changes the first only
where self-attention is what needs most. Calls are those with a new partition. What else runs on the
machine does not matter.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine
from memory_trace import MemoryTrace, trace_memory, watched
from pipeline_contestants import CONTESTANTS, Contestant
from timed_unet import CASES, QUICK, TimedUNet, add_model_arguments, build_unet
from unet_gate import require_sound

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sites import find_sites

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "case", "contestant", "dtype", "batch"),
    *("peak_mib", "peak_in", "attention_mib"),
    *MACHINE_FIELDS,
)
DEFAULT_CASES = ("sd15-512", "sd15-768")
DEFAULT = (
    *("unpatched", "oracle-qkv-50", "tomesd-50", "preset-exact", "atc-keys-50"),
    *("tome-sd-50", "atc-complete-50", "oracle-kv-10", "preset-balanced", "preset-fast"),
)


def measure(calls: TimedUNet, one: Contestant) -> MemoryTrace:
    """Memory during one call of a contestant."""
    sites = find_sites(calls.unet)
    finest = min(site.level for site in sites)
    sample, keywords = calls.inputs(calls.latent, calls.latent)
    timestep = calls.timesteps()[10]

    @torch.no_grad()
    def call() -> None:
        calls.unet(sample, timestep, **keywords, return_dict=False)

    with one.on(calls.unet), watched(calls.unet, [s for s in sites if s.level == finest]):
        return trace_memory(call, calls.device)


def rows(calls: TimedUNet, case: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each contestant."""
    contestants = [CONTESTANTS[name] for name in arguments.contestants]
    require_sound(calls, contestants, case)
    machine = describe_machine(str(calls.device))
    found = []
    for one in contestants:
        trace = measure(calls, one)
        row: dict[str, object] = {
            "benchmark": "memory",
            "case": case,
            "contestant": one.name,
            "dtype": arguments.dtype,
            "batch": calls.batch,
            "peak_mib": f"{trace.peak / 2**20:.1f}",
            "peak_in": trace.peak_module,
            "attention_mib": f"{trace.attention / 2**20:.1f}",
            **machine,
        }
        found.append(row)
        print(
            f"{case:10} {one.name:24} {row['peak_mib']:>8} MiB in {row['peak_in']}, "
            f"around self-attention {row['attention_mib']} MiB"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=DEFAULT_CASES)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=DEFAULT)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=2, help="2: the two branches of guidance")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "memory.csv")
    return parser.parse_args()


def main() -> None:
    """Measure each case."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.quick:
        rows(build_unet(QUICK, arguments), QUICK, arguments)
        return
    for name in arguments.cases:
        calls = build_unet(name, arguments)
        append_rows(arguments.out, FIELDS, rows(calls, name, arguments))
        del calls
        gc.collect()
    print(f"appended to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
