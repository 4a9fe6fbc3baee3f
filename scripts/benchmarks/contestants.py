"""Ways to patch a UNet, which the benchmarks compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import tomesd
import torch
from torch import Tensor

from benchmarks.unet_calls import finest_transformers
from sd_tokenmerge import PRESETS, Grid, MergeConfig, Method, Partition, apply_patch

UNPATCHED = "unpatched"


@dataclass(frozen=True)
class Contestant:
    """One way to patch a UNet.

    Attributes:
        name: in the rows.
        config: of `apply_patch`; None for the unpatched UNet and the tomesd package.
        tomesd_ratio: fraction of the tokens that the tomesd package merges.
    """

    name: str
    config: MergeConfig | None = None
    tomesd_ratio: float | None = None

    @property
    def refresh_every(self) -> int:
        """Steps for which a partition is used."""
        return 1 if self.config is None else self.config.refresh_every

    @contextmanager
    def on(self, unet: Any) -> Iterator[None]:
        """Patch the UNet for as long as the context lasts."""
        if self.tomesd_ratio is not None:
            # the package's default, level 0, has no attention in SDXL
            level, _ = finest_transformers(unet)
            tomesd.apply_patch(unet, ratio=self.tomesd_ratio, max_downsample=2**level)
            try:
                yield
            finally:
                tomesd.remove_patch(unet)
        elif self.config is not None:
            with apply_patch(unet, self.config):
                yield
        else:
            yield


@cache
def random_partition(
    batch: int, num_tokens: int, num_clusters: int, device: torch.device
) -> Partition:
    """Random labels, drawn once for each size; merging by them takes as long as by any labels."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(num_tokens, generator=generator) for _ in range(batch)]
    return Partition((torch.stack(rows) % num_clusters).to(device), num_clusters)


@dataclass(frozen=True)
class Precomputed(Method):
    """The oracle's method: labels that exist before the call, so that choosing costs nothing."""

    name: ClassVar[str] = "precomputed"

    def __call__(self, tokens: Tensor, num_clusters: int, **_: Any) -> Partition:
        """Labels for this size; unlike other methods, it does not even read the tokens."""
        return random_partition(*tokens.shape[:2], num_clusters, tokens.device)

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        return self(tokens, num_clusters)


@dataclass(frozen=True)
class ScikitLearnATC(Method):
    """ATC as its paper's code runs it: image by image, by scikit-learn on a distance matrix."""

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


def oracle_name(config: MergeConfig) -> str:
    """Name of the oracle that merges as much."""
    return f"oracle-{config.merge}-{100 * keep_rate_of(config):g}"


def keep_rate_of(config: MergeConfig) -> float:
    """The fraction of the tokens that is kept, if it is the same in every block and step."""
    rate: float = config.keep_rate.rate  # type: ignore[union-attr]
    return rate


def oracle(config: MergeConfig) -> Contestant:
    """As much merging as by `config`, without the cost of choosing clusters."""
    precomputed = replace(config, method=Precomputed(), features="input", refresh_every=1)
    return Contestant(oracle_name(config), precomputed)


KEYS = MergeConfig(features="keys")
CONTESTANTS = {
    one.name: one
    for one in (
        Contestant(UNPATCHED),
        *map(oracle, PRESETS.values()),
        *(Contestant(f"preset-{name}", preset) for name, preset in PRESETS.items()),
        Contestant("tomesd-50", tomesd_ratio=0.5),
        Contestant("tomesd-25", tomesd_ratio=0.75),
        Contestant("tome-sd-50", MergeConfig("tome-sd")),
        Contestant("atc-keys-50", KEYS),
        Contestant("atc-keys-50-refresh-10", replace(KEYS, refresh_every=10)),
        Contestant("atc-complete-50", MergeConfig("atc:linkage=complete")),
        Contestant("scikit-learn-atc-50", MergeConfig(ScikitLearnATC())),
    )
}


def oracle_of(contestant: str) -> str:
    """Name of the oracle that bounds a contestant: the preset's own, or half with `"qkv"`."""
    return oracle_name(PRESETS.get(contestant.removeprefix("preset-"), PRESETS["paper"]))


def is_bound(contestant: str) -> bool:
    """Whether settings are compared with it: the unpatched UNet and the oracles."""
    return contestant == UNPATCHED or contestant.startswith("oracle")
