"""Ways to run a UNet, which the benchmarks of its time compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

import tomesd
import torch
from torch import Tensor

from sd_tokenmerge import PRESETS, Grid, Method, Partition, apply_patch
from sd_tokenmerge.sites import find_sites


@cache
def random_partition(
    batch: int, num_tokens: int, num_clusters: int, device: torch.device
) -> Partition:
    """Random labels, which cost as much to merge by as any; made once for each size."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(num_tokens, generator=generator) for _ in range(batch)]
    return Partition((torch.stack(rows) % num_clusters).to(device), num_clusters)


@dataclass(frozen=True)
class Precomputed(Method):
    """Labels that are there before the call: the oracle's method."""

    name: ClassVar[str] = "precomputed"

    def __call__(self, tokens: Tensor, num_clusters: int, **_: Any) -> Partition:
        """Labels of this size; the tokens are not even read, unlike by other methods."""
        return random_partition(*tokens.shape[:2], num_clusters, tokens.device)

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


def oracle_name(merge: str, keep_rate: float) -> str:
    """Of the oracle that bounds what merges as much."""
    return f"oracle-{merge}-{100 * keep_rate:g}"


def oracle(merge: str, keep_rate: float) -> Contestant:
    """Merging without the cost of choosing; with `"kv"`, a merged key counts all its tokens."""
    options = {"method": Precomputed(), "keep_rate": keep_rate, "merge": merge}
    return Contestant(
        oracle_name(merge, keep_rate), options | {"proportional_attention": merge == "kv"}
    )


CONTESTANTS = {
    one.name: one
    for one in (
        Contestant("unpatched"),
        oracle("qkv", 0.5),
        Contestant("tomesd-50", tomesd_ratio=0.5),
        Contestant("preset-exact", {"preset": "exact"}),
        Contestant("atc-keys-50", {"features": "keys"}),
        Contestant("atc-keys-50-refresh-10", {"features": "keys", "refresh_every": 10}),
        Contestant("preset-balanced", {"preset": "balanced"}),
        Contestant("preset-fast", {"preset": "fast"}),
        *(oracle(preset.merge, preset.keep_rate) for preset in reversed(PRESETS.values())),
        Contestant("scikit-learn-atc-50", {"method": ScikitLearnATC()}, rounds=1),
        Contestant(
            "oracle-kv-10-unsized", {"method": Precomputed(), "keep_rate": 0.1, "merge": "kv"}
        ),
        Contestant("tomesd-25", tomesd_ratio=0.75),
        Contestant("tome-sd-50", {"method": "tome-sd"}),
        Contestant("tome-sd-50-keys", {"method": "tome-sd", "features": "keys"}),
        Contestant("atc-50-refresh-10", {"refresh_every": 10}),
        Contestant("atc-complete-50", {"method": "atc:linkage=complete"}),
    )
}
CPU_CONTESTANTS = (
    *("unpatched", "oracle-qkv-50", "tomesd-50", "preset-exact"),
    *("atc-keys-50", "atc-keys-50-refresh-10", "preset-balanced", "preset-fast"),
    *(oracle_name(PRESETS["fast"].merge, PRESETS["fast"].keep_rate), "scikit-learn-atc-50"),
)
"""What is timed by default where a call takes seconds."""


def patch_with_tomesd(unet: Any, ratio: float, **options: Any) -> None:
    """Apply tomesd at the finest level that has attention; its default merges nothing in SDXL."""
    finest = min(site.level for site in find_sites(unet))
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=2**finest, **options)


T = TypeVar("T")


def rotated(contestants: Sequence[T], rounds: int) -> list[T]:
    """Another order in every round: turned on, and backwards in every other one."""
    start = rounds * 3 % max(len(contestants), 1)
    order = [*contestants[start:], *contestants[:start]]
    return order if rounds % 2 == 0 else order[::-1]
