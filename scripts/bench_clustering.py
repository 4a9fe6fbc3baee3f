"""Time agglomerative clustering against its baselines; one CSV row per measurement.

python scripts/bench_clustering.py speed      linkages against scikit-learn, SciPy, fastcluster
python scripts/bench_clustering.py growth     time and peak memory up to 16,384 tokens
python scripts/bench_clustering.py methods    every merging method at the same sizes

The contestants of a group take turns, so that what else the machine does meets all of them
alike; the median is reported. `limit` is one nearest-neighbour search over all tokens, as a
blocked float32 product and an arg-max: what a search without any clustering costs.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels
from sd_tokenmerge.methods import METHODS, partition

KEEP_RATE = 0.5
FIELDS = (
    "benchmark",
    "contestant",
    "device",
    "threads",
    "batch",
    "tokens",
    "channels",
    "kind",
    "clusters",
    "repeats",
    "ms_per_image",
    "fastest_ms",
    "slowest_ms",
    "times_limit",
    "peak_mib",
    "load",
    "torch",
    "versions",
    "commit",
)


def main() -> None:
    """Run one benchmark and print its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "growth", "methods", "one"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--grid", type=int, default=64, help="height and width in tokens")
    parser.add_argument("--channels", type=int, nargs="+", default=[320, 40])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--linkages", nargs="+", default=list(LINKAGES), choices=LINKAGES)
    parser.add_argument("--grids", type=int, nargs="+", default=[32, 64, 96, 128])
    parser.add_argument("--out", type=Path, help="CSV file, appended to; default: only print")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "one":
        print(json.dumps(measure_one(arguments)))
        return
    rows = {"speed": speed, "growth": growth, "methods": methods}[arguments.what](arguments)
    report(rows, arguments)


def make_tokens(kind: str, batch: int, grid: int, channels: int) -> Tensor:
    """White noise, or a field blurred over 2 tokens as neighbouring features are, `[B, N, C]`."""
    random = np.random.default_rng(0)
    field = random.standard_normal((batch, grid, grid, channels), dtype=np.float32)
    if kind == "smooth":
        field = gaussian_filter(field, (0, 2, 2, 0), mode="nearest")
    return torch.from_numpy(field).view(batch, grid * grid, channels)


def limit(tokens: Tensor) -> list[Tensor]:
    """The nearest other token of every token, by one blocked product and arg-max."""
    nearest = []
    for image in torch.nn.functional.normalize(tokens, dim=-1):
        product = image.new_empty(512, len(image))
        for rows in torch.arange(len(image), device=image.device).split(512):
            part = product[: len(rows)]
            torch.mm(image[rows[0] : rows[-1] + 1], image.T, out=part)
            part[torch.arange(len(rows), device=image.device), rows] = -torch.inf
            nearest.append(part.argmax(1))
    return nearest


def distances(image: Tensor) -> np.ndarray:
    """Cosine distances as the ATC paper's code hands them to scikit-learn."""
    unit = torch.nn.functional.normalize(image, dim=-1)
    return (1 - unit @ unit.T).cpu().numpy()


def scikit_learn(tokens: Tensor, num_clusters: int, linkage: str) -> None:
    """As the ATC paper uses it: image by image, on a precomputed distance matrix."""
    from sklearn.cluster import AgglomerativeClustering

    for image in tokens:
        AgglomerativeClustering(
            n_clusters=num_clusters, metric="precomputed", linkage=linkage
        ).fit_predict(distances(image))


def scipy(tokens: Tensor, num_clusters: int, linkage: str) -> None:
    """SciPy's hierarchy and cut."""
    from scipy.cluster import hierarchy

    for image in tokens:
        matrix = distances(image)
        tree = hierarchy.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
        hierarchy.fcluster(tree, num_clusters, "maxclust")


def fast_cluster(tokens: Tensor, num_clusters: int, linkage: str) -> None:
    """The hierarchy of fastcluster and the cut of SciPy."""
    import fastcluster
    from scipy.cluster import hierarchy

    for image in tokens:
        matrix = distances(image)
        tree = fastcluster.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
        hierarchy.fcluster(tree, num_clusters, "maxclust")


BASELINES = {"scikit-learn": scikit_learn, "SciPy": scipy, "fastcluster": fast_cluster}


def speed(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Every linkage against its baselines, on smooth and on white tokens."""
    rows = []
    for channels in arguments.channels:
        for kind in ("smooth", "white"):
            tokens = make_tokens(kind, arguments.batch, arguments.grid, channels)
            tokens = tokens.to(arguments.device)
            clusters = round(tokens.shape[1] * KEEP_RATE)
            contestants: dict[str, Callable[[], object]] = {"limit": lambda t=tokens: limit(t)}
            for linkage in arguments.linkages:
                for name, search_dtype in (("", None), (", float32 search", torch.float32)):
                    contestants[f"sd_tokenmerge {linkage}{name}"] = (
                        lambda t=tokens, k=clusters, link=linkage, d=search_dtype: (
                            agglomerative_labels(t, k, link, d)
                        )
                    )
                if arguments.device == "cpu":
                    for name, run in BASELINES.items():
                        contestants[f"{name} {linkage}"] = (
                            lambda t=tokens, k=clusters, link=linkage, run=run: run(t, k, link)
                        )
            rows += compare(contestants, tokens, kind, clusters, "speed", arguments)
    return rows


def methods(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Every method of the package."""
    rows = []
    for channels in arguments.channels:
        tokens = make_tokens("smooth", arguments.batch, arguments.grid, channels)
        tokens = tokens.to(arguments.device)
        clusters = round(tokens.shape[1] * KEEP_RATE)
        contestants: dict[str, Callable[[], object]] = {"limit": lambda t=tokens: limit(t)}
        for name, method in METHODS.items():
            scores = tokens.norm(dim=-1) if method.uses_scores else None
            grid = (arguments.grid, arguments.grid)
            contestants[name] = lambda t=tokens, n=name, k=clusters, s=scores, g=grid: partition(
                t, n, num_clusters=k, grid=g, scores=s
            )
        rows += compare(contestants, tokens, "smooth", clusters, "methods", arguments)
    return rows


def compare(
    contestants: dict[str, Callable[[], object]],
    tokens: Tensor,
    kind: str,
    clusters: int,
    benchmark: str,
    arguments: argparse.Namespace,
) -> list[dict[str, object]]:
    """Let the contestants take turns; rows with medians."""
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(arguments.repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if tokens.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
    batch, count, channels = tokens.shape
    at_limit = statistics.median(seconds["limit"])
    return [
        {
            "benchmark": benchmark,
            "contestant": name,
            "batch": batch,
            "tokens": count,
            "channels": channels,
            "kind": kind,
            "clusters": clusters if name != "limit" else "",
            "repeats": len(taken),
            "ms_per_image": milliseconds(statistics.median(taken) / batch),
            "fastest_ms": milliseconds(min(taken) / batch),
            "slowest_ms": milliseconds(max(taken) / batch),
            "times_limit": f"{statistics.median(taken) / at_limit:.2f}",
            "load": f"{load:.2f}",
        }
        for name, taken in seconds.items()
    ]


def growth(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Time and peak memory as the number of tokens grows, each in a process of its own."""
    rows: list[dict[str, object]] = []
    for linkage in arguments.linkages:
        for grid in arguments.grids:
            command = [sys.executable, __file__, "one", "--batch", "1", "--grid", str(grid)]
            command += ["--channels", str(arguments.channels[0]), "--linkages", linkage]
            command += ["--repeats", str(min(arguments.repeats, 3))]
            command += ["--threads", str(arguments.threads), "--device", arguments.device]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr)
    return rows


def measure_one(arguments: argparse.Namespace) -> dict[str, object]:
    """One linkage at one size; the memory is what the process grew by at its peak."""
    linkage, channels = arguments.linkages[0], arguments.channels[0]
    small = make_tokens("smooth", 1, 24, channels).to(arguments.device)
    agglomerative_labels(small, 300, linkage)  # loads what is loaded once
    tokens = make_tokens("smooth", 1, arguments.grid, channels).to(arguments.device)
    clusters = round(tokens.shape[1] * KEEP_RATE)
    gc.collect()
    load = os.getloadavg()[0]
    before = memory(arguments.device)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        agglomerative_labels(tokens, clusters, linkage)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory(arguments.device) - before
    return {
        "benchmark": "growth",
        "contestant": f"sd_tokenmerge {linkage}",
        "batch": 1,
        "tokens": tokens.shape[1],
        "channels": channels,
        "kind": "smooth",
        "clusters": clusters,
        "repeats": len(seconds),
        "ms_per_image": milliseconds(statistics.median(seconds)),
        "fastest_ms": milliseconds(min(seconds)),
        "slowest_ms": milliseconds(max(seconds)),
        "peak_mib": f"{peak / 2**20:.0f}",
        "load": f"{load:.2f}",
    }


def memory(device: str) -> int:
    """Bytes in use now: resident on the CPU, allocated on a GPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory(device: str) -> int:
    """The most bytes there have been in use."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def milliseconds(seconds: float) -> str:
    """Milliseconds to three digits."""
    return f"{seconds * 1e3:.3g}"


def report(rows: list[dict[str, object]], arguments: argparse.Namespace) -> None:
    """Print the rows, and append them to a file."""
    machine = describe_machine(arguments.device, arguments.threads)
    complete = [{field: {**row, **machine}.get(field, "") for field in FIELDS} for row in rows]
    for row in complete:
        print(
            f"{row['tokens']:>6} x {row['channels']:>4} {row['kind']:6} {row['contestant']:38} "
            f"{row['ms_per_image']:>8} ms  {row['times_limit']:>6}  {row['peak_mib']:>6}"
        )
    if arguments.out:
        is_new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
            writer.writerows(complete)


def describe_machine(device: str, threads: int) -> dict[str, object]:
    """What the numbers depend on."""
    packages = ("scikit-learn", "scipy", "fastcluster", "numpy", "triton")
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../sd_tokenmerge"], capture_output=True, text=True
    )
    name = torch.cuda.get_device_name() if device != "cpu" else processor()
    return {
        "device": name,
        "threads": threads,
        "torch": torch.__version__,
        "versions": " ".join(f"{p}={importlib.metadata.version(p)}" for p in packages),
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout else ""),
    }


def processor() -> str:
    """The CPU's name and whether it multiplies bfloat16."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
