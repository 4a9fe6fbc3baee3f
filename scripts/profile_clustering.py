"""Where the time of agglomerative clustering goes: the share of each kind of operation.

    python scripts/profile_clustering.py              # average linkage, 40 and 320 channels, white
    python scripts/profile_clustering.py --write      # and put the table into docs/clustering.md
    python scripts/profile_clustering.py --channels 48 --tokens 1024 --linkage complete

Shares are of the profiler's own time on one thread, which counts its overhead too.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import torch
from bench_rows import describe_commit, processor
from torch.profiler import ProfilerActivity, profile

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "clustering.md"
PART = re.compile(r"(?<=<!-- begin profile -->\n).*?(?=<!-- end profile -->)", re.DOTALL)
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "row-wise maxima": ("max", "amax", "min", "amin", "topk", "kthvalue", "argmax"),
    "gathering, scattering, copying": (
        *("index_select", "index", "_index_put_impl_", "gather", "scatter_", "copy_", "cat"),
        *("take", "index_add_", "index_copy_", "scatter_reduce_"),
    ),
    "sorting": ("sort", "searchsorted", "unique_consecutive"),
}
OTHERS = "everything else"
BATCH = 2
REPEATS = 5


def main() -> None:
    """Profile and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linkage", choices=sorted(LINKAGES), default="average")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, nargs="+", default=[40, 320])
    parser.add_argument("--write", action="store_true", help="into docs/clustering.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = tabulate(options.linkage, options.tokens, options.channels)
    print(table)
    if options.write:
        text, count = PART.subn(lambda _: f"\n{table}\n\n", DOCUMENT.read_text("utf-8"))
        if count != 1:
            raise ValueError(f"{DOCUMENT} must have one part named profile, got {count}.")
        DOCUMENT.write_text(text, "utf-8")


def tabulate(linkage: str, tokens: int, channels: list[int]) -> str:
    """A Markdown table with one column for each number of channels."""
    profiles = [measure(linkage, tokens, width) for width in channels]
    shapes = [f"{BATCH} x {tokens:,} x {width}" for width in channels]
    rows = [
        [kind, *(f"{100 * spent[kind] / spent.total():.0f} %" for spent, _ in profiles)]
        for kind in (*KINDS, OTHERS)
    ]
    rows.append(["operator calls per image", *(f"{calls:,}" for _, calls in profiles)])
    machine = f"{processor()}, one thread, torch {torch.__version__}; commit {describe_commit()}."
    head = [f"{linkage}, white tokens", *shapes]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([machine, "", lines[0], "|---" * len(head) + "|", *lines[1:]])


def measure(linkage: str, tokens: int, channels: int) -> tuple[Counter[str], int]:
    """The time spent in each kind of operation, and the operator calls per image.

    Args:
        linkage: as for `agglomerative_labels`, which keeps half of the tokens.
        tokens: of each of the `BATCH` images.
        channels: of each token.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, tokens, channels, generator=generator)
    for _ in range(REPEATS):
        agglomerative_labels(images, tokens // 2, linkage)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(REPEATS):
            agglomerative_labels(images, tokens // 2, linkage)
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    spent: Counter[str] = Counter()
    calls = 0
    for event in profiler.key_averages():
        spent[kind_of.get(event.key, OTHERS)] += event.self_cpu_time_total
        calls += event.count
    return spent, calls // (REPEATS * BATCH)


if __name__ == "__main__":
    main()
