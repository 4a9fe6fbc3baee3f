"""What token merging saves of a UNet call, on the real architectures with random weights.

    python scripts/bench_pipeline.py --minutes 16     # this device's default cases
    python scripts/bench_pipeline.py --cases sd15-768 --contestants unpatched oracle-qkv-50
    python scripts/bench_pipeline.py --quick          # a tiny model: does it run?

Every case is one UNet at one size. Before timing, each contestant is checked on small latents: the
output is finite, removal restores the model to the last bit, and implementations that should agree
do. Then the contestants take turns, in another order in every round, until the time is used up.

`oracle` merges by labels that are there before: nothing can choose clusters in less time. A setting
with `refresh_every=n` is called twice in a turn, with a new partition and with a kept one, and its
step time is that of the first plus n - 1 times the second, over n.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tomesd
import torch
from bench_rows import append_rows, describe_machine, percentile
from diffusers import UNet2DConditionModel
from torch import Tensor

from sd_tokenmerge import PRESETS, Grid, Method, Partition, apply_patch
from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sites import find_sites

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "benchmark",
    "case",
    "contestant",
    "dtype",
    "batch",
    "refresh_every",
    "repeats",
    "step_ms",
    "step_ms_20",
    "step_ms_80",
    "fresh_ms",
    "kept_ms",
    "speedup",
    "peak_mib",
    *("device", "threads", "load", "torch", "versions", "commit"),
)
TIMESTEPS = 50
"""Entries of the scheduler's `timesteps` that the calls pretend to come from."""


@dataclass(frozen=True)
class Case:
    """A UNet at a size."""

    config: str
    pixels: int
    batch: int = 2

    @property
    def latent(self) -> int:
        """Height and width of the latents."""
        return self.pixels // 8


CASES = {
    "sd15-512": Case("stable-diffusion-v1-5", 512),
    "sd15-768": Case("stable-diffusion-v1-5", 768),
    "sd15-1024": Case("stable-diffusion-v1-5", 1024),
    "sd15-1536": Case("stable-diffusion-v1-5", 1536),
    "sd21-768": Case("stable-diffusion-2-1", 768),
    "sdxl-1024": Case("stable-diffusion-xl-base-1.0", 1024),
}
CPU_CASES = ("sd15-512", "sd15-768")
QUICK_CASE = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}


@dataclass(frozen=True)
class Precomputed(Method):
    """Labels that are there before the call: the oracle's method."""

    name: ClassVar[str] = "precomputed"

    def __post_init__(self) -> None:
        """Start with no labels."""
        object.__setattr__(self, "_kept", {})

    def __call__(self, tokens: Tensor, num_clusters: int, **_: Any) -> Partition:
        """The labels of the first call at this size; random ones, like any labels in cost."""
        kept: dict[Any, Partition] = self._kept  # type: ignore[attr-defined]
        key = (tokens.shape[:2], num_clusters, tokens.device)
        if key not in kept:
            generator = torch.Generator().manual_seed(0)
            batch, count = tokens.shape[:2]
            rows = [torch.randperm(count, generator=generator) % num_clusters for _ in range(batch)]
            kept[key] = Partition(torch.stack(rows).to(tokens.device), num_clusters)
        return kept[key]

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        return self(tokens, num_clusters)


@dataclass(frozen=True)
class ScikitLearnATC(Method):
    """ATC as its paper runs it: image by image, on a distance matrix, by scikit-learn."""

    name: ClassVar[str] = "scikit-learn"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        from sklearn.cluster import AgglomerativeClustering

        labels = []
        for image in torch.nn.functional.normalize(tokens, dim=-1):
            found = AgglomerativeClustering(
                n_clusters=num_clusters, metric="precomputed", linkage="average"
            ).fit_predict((1 - image @ image.T).cpu().numpy())
            labels.append(torch.from_numpy(found).to(tokens.device, torch.int64))
        return Partition(torch.stack(labels), num_clusters)


@dataclass(frozen=True)
class Contestant:
    """One way to run the UNet.

    Attributes:
        name: in the rows.
        options: of `apply_patch`; None for the unpatched UNet and tomesd.
        tomesd_ratio: fraction that tomesd merges.
        rounds: in how many rounds it takes part; None: in all.
    """

    name: str
    options: dict[str, Any] | None = None
    tomesd_ratio: float | None = None
    rounds: int | None = None

    @property
    def refresh_every(self) -> int:
        """Steps for which a partition is used."""
        if self.options is None:
            return 1
        preset = PRESETS[self.options.get("preset", "exact")]
        return int(self.options.get("refresh_every", preset.refresh_every))

    @contextmanager
    def on(self, unet: Any) -> Iterator[None]:
        """The UNet, so patched."""
        if self.tomesd_ratio is not None:
            patch_with_tomesd(unet, self.tomesd_ratio)
            try:
                yield
            finally:
                tomesd.remove_patch(unet)
        elif self.options is not None:
            with apply_patch(unet, **self.options):
                yield
        else:
            yield


_KV = {"merge": "kv", "proportional_attention": True}
CONTESTANTS = {
    one.name: one
    for one in (
        Contestant("unpatched"),
        Contestant("oracle-qkv-50", {"method": Precomputed(), "keep_rate": 0.5}),
        Contestant("tomesd-50", tomesd_ratio=0.5),
        Contestant("preset-exact", {"preset": "exact"}),
        Contestant("atc-keys-50", {"features": "keys"}),
        Contestant("atc-keys-50-refresh-10", {"features": "keys", "refresh_every": 10}),
        Contestant("preset-balanced", {"preset": "balanced"}),
        Contestant("preset-fast", {"preset": "fast"}),
        Contestant("oracle-kv-10", {"method": Precomputed(), "keep_rate": 0.1, **_KV}),
        Contestant("scikit-learn-atc-50", {"method": ScikitLearnATC()}, rounds=1),
        # not by default on a CPU
        Contestant("oracle-kv-25", {"method": Precomputed(), "keep_rate": 0.25, **_KV}),
        Contestant(
            "oracle-kv-10-unsized", {"method": Precomputed(), "keep_rate": 0.1} | {"merge": "kv"}
        ),
        Contestant("tomesd-75", tomesd_ratio=0.75),
        Contestant("tome-sd-50", {"method": "tome-sd"}),
        Contestant("tome-sd-50-keys", {"method": "tome-sd", "features": "keys"}),
        Contestant("atc-50-refresh-10", {"refresh_every": 10}),
        Contestant("atc-complete-50", {"method": "atc:linkage=complete"}),
    )
}
CPU_CONTESTANTS = tuple(CONTESTANTS)[:10]


@dataclass
class Timings:
    """Seconds of one contestant's calls."""

    fresh: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    peak: int | None = None

    def steps(self, refresh_every: int) -> list[float]:
        """Seconds per step of each turn, over a partition's life."""
        if refresh_every == 1:
            return self.fresh
        pairs = zip(self.fresh, self.kept, strict=True)
        return [(a + (refresh_every - 1) * b) / refresh_every for a, b in pairs]


class Bench:
    """One case: a UNet, its inputs, and the contestants."""

    def __init__(self, name: str, case: Case | None, arguments: argparse.Namespace) -> None:
        """Build the UNet with random weights; `case` None: a tiny one."""
        self.name = name
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = getattr(torch, arguments.dtype)
        self.latent = 32 if case is None else case.latent
        self.batch = arguments.batch or (2 if case is None else case.batch)
        config = QUICK_CASE if case is None else read_config(arguments.configs, case.config)
        torch.manual_seed(0)
        with self.device:
            self.unet = UNet2DConditionModel.from_config(config).to(self.dtype).eval()
        self.contestants = [CONTESTANTS[name] for name in arguments.contestants]

    def inputs(self, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
        """The sample and the other keyword arguments of a call; the timestep is missing."""
        generator = torch.Generator().manual_seed(1)
        config = self.unet.config

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        keywords: dict[str, Any] = {
            "encoder_hidden_states": draw(self.batch, 77, config.cross_attention_dim)
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * 256
            sizes = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width])
            keywords["added_cond_kwargs"] = {
                "text_embeds": draw(self.batch, pooled),
                "time_ids": sizes.repeat(self.batch, 1).to(self.device, self.dtype),
            }
        return draw(self.batch, config.in_channels, height, width), keywords

    @torch.no_grad()
    def call(self, timestep: Tensor, height: int, width: int) -> Tensor:
        """One call of the UNet."""
        sample, keywords = self.inputs(height, width)
        output: Tensor = self.unet(sample, timestep, **keywords, return_dict=False)[0]
        return output

    @torch.no_grad()
    def timed(self, timestep: Tensor) -> float:
        """Seconds of one call at the case's size."""
        sample, keywords = self.inputs(self.latent, self.latent)
        self.synchronize()
        start = time.perf_counter()
        self.unet(sample, timestep, **keywords, return_dict=False)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timesteps(self) -> Tensor:
        """Those of a new generation."""
        return torch.linspace(981, 1, TIMESTEPS).long().to(self.device)

    def check(self) -> None:
        """Refuse to time what is wrong.

        Raises:
            SystemExit: an output is not finite, merging did nothing, something stays after removal,
                or two implementations of the same method differ.
        """
        size = (24, 16)
        timestep = self.timesteps()[10]
        plain = self.call(timestep, *size)
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        for one in self.contestants:
            with one.on(self.unet):
                merged = self.call(timestep, *size)
            if not merged.isfinite().all():
                sys.exit(f"{self.name}: {one.name} is not finite.")
            if torch.equal(merged, plain) != (one.name == "unpatched"):
                sys.exit(f"{self.name}: {one.name} did nothing.")
            if not torch.equal(self.call(timestep, *size), plain):
                sys.exit(f"{self.name}: {one.name} leaves something behind.")
        outputs = {}
        twins = {
            "atc": {"method": "atc"},
            "scikit-learn": {"method": ScikitLearnATC()},
            "tome-sd": {"method": "tome-sd"},
        }
        for name, options in twins.items():
            with apply_patch(self.unet, **options):  # type: ignore[arg-type]
                outputs[name] = self.call(timestep, *size)
        patch_with_tomesd(self.unet, 0.5, use_rand=False)
        outputs["tomesd"] = self.call(timestep, *size)
        tomesd.remove_patch(self.unet)
        for ours, theirs in (("tome-sd", "tomesd"), ("atc", "scikit-learn")):
            error = (outputs[ours] - outputs[theirs]).norm() / plain.norm()
            if error > tolerance:
                sys.exit(f"{self.name}: {ours} and {theirs} differ by {error:.1e}.")
        print(f"{self.name}: checks passed", file=sys.stderr)

    def run(self, seconds: float) -> list[dict[str, object]]:
        """Take turns for so long, at least one round; rows."""
        timings = {one.name: Timings() for one in self.contestants}
        started = time.perf_counter()
        print(f"{self.name}: warm-up {self.timed(self.timesteps()[0]):.2f} s", file=sys.stderr)
        rounds = 0
        while True:
            begun = time.perf_counter()
            for one in rotated(self.contestants, rounds):
                if one.rounds is None or rounds < one.rounds:
                    self.turn(one, timings[one.name])
            rounds += 1
            now = time.perf_counter()
            print(f"{self.name}: round {rounds} took {now - begun:.0f} s", file=sys.stderr)
            if now - started + 0.9 * (now - begun) > seconds or rounds == self.arguments.rounds:
                break
        if self.arguments.memory:
            for one in self.contestants:
                timings[one.name].peak = self.peak(one)
        return self.rows(timings)

    def turn(self, one: Contestant, timings: Timings) -> None:
        """Time one contestant's call, or two where a partition is kept."""
        steps = self.timesteps()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with one.on(self.unet):
            timings.fresh.append(self.timed(steps[10]))
            if one.refresh_every > 1:
                timings.kept.append(self.timed(steps[11]))
        if self.device.type == "cuda":
            timings.peak = torch.cuda.max_memory_allocated(self.device)

    def peak(self, one: Contestant) -> int:
        """Most bytes of tensors alive at a time in one call, beyond those before it."""
        sample, keywords = self.inputs(self.latent, self.latent)
        timestep = self.timesteps()[10]

        @torch.no_grad()
        def call() -> None:
            self.unet(sample, timestep, **keywords, return_dict=False)

        with one.on(self.unet):
            return peak_bytes(call)

    def rows(self, timings: dict[str, Timings]) -> list[dict[str, object]]:
        """One row for each contestant."""
        machine = describe_machine(str(self.device))
        unpatched = timings.get("unpatched")
        rows = []
        for one in self.contestants:
            taken = timings[one.name]
            steps = taken.steps(one.refresh_every)
            step = statistics.median(steps)
            row: dict[str, object] = {
                "benchmark": "unet-step",
                "case": self.name,
                "contestant": one.name,
                "dtype": self.arguments.dtype,
                "batch": self.batch,
                "refresh_every": one.refresh_every,
                "repeats": len(steps),
                "step_ms": milliseconds(step),
                "step_ms_20": milliseconds(percentile(steps, 0.2)),
                "step_ms_80": milliseconds(percentile(steps, 0.8)),
                "fresh_ms": milliseconds(statistics.median(taken.fresh)),
                "kept_ms": milliseconds(statistics.median(taken.kept)) if taken.kept else "",
                "speedup": f"{statistics.median(unpatched.fresh) / step:.3f}" if unpatched else "",
                "peak_mib": "" if taken.peak is None else f"{taken.peak / 2**20:.0f}",
                **machine,
            }
            rows.append(row)
            print(
                f"{self.name:10} {one.name:24} {row['step_ms']:>8} ms "
                f"({row['step_ms_20']} to {row['step_ms_80']}, {len(steps)}x)  "
                f"{row['speedup']}x  {row['peak_mib']} MiB"
            )
        return rows


def patch_with_tomesd(unet: Any, ratio: float, **options: Any) -> None:
    """Apply tomesd at the finest level that has attention; its default merges nothing in SDXL."""
    finest = min(site.level for site in find_sites(unet))
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=2**finest, **options)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that PyTorch has allocated on the CPU at a time during a call, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler.kineto_results
    allocations = [event for event in results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    now = most = 0
    for event in allocations:
        now += event.nbytes()
        most = max(most, now)
    return most


def rotated(contestants: list[Contestant], rounds: int) -> list[Contestant]:
    """Another order in every round: turned on, and backwards in every other one."""
    start = rounds * 3 % len(contestants)
    order = contestants[start:] + contestants[:start]
    return order if rounds % 2 == 0 else order[::-1]


def milliseconds(seconds: float) -> str:
    """Milliseconds, to a tenth below a second."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.1f}"


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A model's UNet configuration.

    Raises:
        SystemExit: it is not there.
    """
    path = folder / name / "unet" / "config.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: name a folder of diffusers configurations by --configs.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS))
    parser.add_argument("--configs", type=Path, default=ROOT.parent / "shared" / "model-configs")
    parser.add_argument("--minutes", type=float, default=16.0, help="for all cases together")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--batch", type=int, help="default: 2, the two branches of guidance")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float16" if on_gpu else "float32")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--memory", action="store_true", help="one more call each, for CPU memory")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "pipeline.csv")
    arguments = parser.parse_args()
    is_cpu = arguments.device == "cpu"
    if is_cpu and arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.cases = arguments.cases or list(CPU_CASES if is_cpu else CASES)
    arguments.contestants = arguments.contestants or list(
        CPU_CONTESTANTS if is_cpu else CONTESTANTS
    )
    return arguments


def main() -> None:
    """Check and time each case."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.quick:
        bench = Bench("quick", None, arguments)
        bench.check()
        bench.run(arguments.minutes * 60)
        return
    work = sum(CASES[name].latent ** 2 for name in arguments.cases)
    for name in arguments.cases:
        bench = Bench(name, CASES[name], arguments)
        bench.check()
        share = CASES[name].latent ** 2 / work
        append_rows(arguments.out, FIELDS, bench.run(arguments.minutes * 60 * share))
        del bench
        gc.collect()
    print(f"appended to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
