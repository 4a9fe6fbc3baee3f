"""Where the time of agglomerative clustering goes: the share of each kind of operation.

    python scripts/profile_clustering.py              # average linkage, 2 x 4,096 x 40, white
    python scripts/profile_clustering.py --channels 320 --linkage complete

Shares are of the profiler's own time on one thread, which counts its overhead too.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels

KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "row-wise maxima": ("max", "amax", "min", "amin", "topk", "kthvalue", "argmax"),
    "gathering, scattering, copying": (
        *("index_select", "index", "_index_put_impl_", "gather", "scatter_", "copy_", "cat"),
        *("take", "index_add_", "index_copy_", "scatter_reduce_"),
    ),
    "sorting": ("sort", "searchsorted", "unique_consecutive"),
}
REPEATS = 5


def main() -> None:
    """Profile and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linkage", choices=sorted(LINKAGES), default="average")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, options.tokens, options.channels, generator=generator)
    num_clusters = options.tokens // 2
    for _ in range(REPEATS):
        agglomerative_labels(tokens, num_clusters, options.linkage)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(REPEATS):
            agglomerative_labels(tokens, num_clusters, options.linkage)
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    spent: Counter[str] = Counter()
    calls = 0
    for event in profiler.key_averages():
        spent[kind_of.get(event.key, "everything else")] += event.self_cpu_time_total
        calls += event.count
    print("| operations | share |\n|---|---|")
    for kind, time in spent.most_common():
        print(f"| {kind} | {100 * time / spent.total():.0f} % |")
    print(f"\n{calls // REPEATS:,} operator calls in a clustering of both images.")


if __name__ == "__main__":
    main()
