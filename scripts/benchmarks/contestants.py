"""Ways to patch a UNet, which the benchmarks compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge import PRESETS, Grid, MergeConfig, Method, Partition
from sd_tokenmerge.bench.contestants import (
    UNPATCHED,
    Contestant,
    oracle_name,
    preset_contestants,
)


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


KEYS = MergeConfig(features="keys")
CONTESTANTS = {
    one.name: one
    for one in (
        *preset_contestants(),
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
