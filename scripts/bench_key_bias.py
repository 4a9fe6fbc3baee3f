"""Ways to add log(cluster size) to the logits of merged keys, per device and head width.

    python scripts/bench_key_bias.py              # about a minute on two cores
    python scripts/bench_key_bias.py --quick      # small; rows are not saved

`mask` adds it as a mask that is broadcast over the queries. `channel` appends one channel to the
queries (1) and keys (the log over the scale), and an empty one to the values, because fused kernels
want the three equally wide. Both are exact. `none` leaves the sizes out: the lower bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine, percentile
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "way", "dtype", "batch", "heads", "width", "queries", "keys"),
    *("repeats", "ms", "ms_20", "ms_80", "times_none"),
    *MACHINE_FIELDS,
)
HEADS = ((8, 40), (5, 64), (8, 80), (10, 64))
"""Heads and their widths: SD 1.5 and 2.1 at the finest level, SD 1.5 at the second, SDXL."""


def none(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention without sizes."""
    return F.scaled_dot_product_attention(q, k, v)


def mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As diffusers passes a mask `[B, 1, K]` on: repeated over the heads."""
    repeated = bias.repeat_interleave(q.shape[1], dim=0).view(len(q), q.shape[1], 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=repeated)


def channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One more channel, and seven empty ones where the kernels want widths of 8."""
    width = q.shape[-1]
    pad = 7 if q.is_cuda else 0
    logs = (bias * width**0.5).unsqueeze(-1).expand(-1, q.shape[1], -1, -1)
    queries = F.pad(torch.cat([q, q.new_ones(1).expand(*q.shape[:-1], 1)], -1), (0, pad))
    keys = F.pad(torch.cat([k, logs], -1), (0, pad))
    values = F.pad(v, (0, 1 + pad))
    output = F.scaled_dot_product_attention(queries, keys, values, scale=width**-0.5)
    return output[..., :width]


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "none": none,
    "mask": mask,
    "channel": channel,
}


def measure(
    heads: int, width: int, queries: int, keys: int, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """Let the ways take turns at one size.

    Raises:
        SystemExit: they differ.
    """
    device, dtype, batch = arguments.device, getattr(torch, arguments.dtype), arguments.batch
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, width).to(device, dtype)
    k, v = (torch.randn(batch, heads, keys, width).to(device, dtype) for _ in range(2))
    bias = torch.randint(1, 20, (batch, 1, keys)).log().to(device, dtype)
    error = (mask(q, k, v, bias) - channel(q, k, v, bias)).abs().max()
    if error > (1e-4 if dtype == torch.float32 else 2e-2):
        sys.exit(f"the ways differ by {error:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(arguments.repeats + 1):
        for name, way in WAYS.items():
            synchronize(device)
            start = time.perf_counter()
            way(q, k, v, bias)
            synchronize(device)
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
    lower_bound = statistics.median(seconds["none"])
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        row = {
            "benchmark": "key-bias",
            "way": name,
            "dtype": arguments.dtype,
            "batch": batch,
            "heads": heads,
            "width": width,
            "queries": queries,
            "keys": keys,
            "repeats": len(taken),
            "ms": f"{1e3 * median:.3g}",
            "ms_20": f"{1e3 * percentile(taken, 0.2):.3g}",
            "ms_80": f"{1e3 * percentile(taken, 0.8):.3g}",
            "times_none": f"{median / lower_bound:.3f}",
            **describe_machine(device),
        }
        rows.append(row)
        print(f"{heads} x {width}, {queries} x {keys}: {name:8} {row['ms']} ms")
    return rows


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float16" if on_gpu else "float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "key_bias.csv")
    arguments = parser.parse_args()
    queries = 256 if arguments.quick else 4096
    rows = []
    for heads, width in HEADS:
        for keys in (queries // 2, queries // 10):
            rows += measure(heads, width, queries, keys, arguments)
    if not arguments.quick:
        append_rows(arguments.out, FIELDS, rows)


if __name__ == "__main__":
    main()
