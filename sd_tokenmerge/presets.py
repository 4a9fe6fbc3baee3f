"""Presets: settings of `apply_patch` that belong together. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Features = Literal["input", "keys"]
Merge = Literal["qkv", "kv", "q"]


@dataclass(frozen=True)
class Preset:
    """What `apply_patch` does where its arguments say nothing; see there for their meaning.

    Attributes:
        summary: what it is for, in a line.
        method: as in `apply_patch`, as the others.
        keep_rate: fraction of the tokens that is kept.
        features: what is clustered.
        merge: which of queries, keys and values are merged.
        refresh_every: denoising steps for which a partition is used.
        share_layers: whether the blocks of a level share one.
        proportional_attention: whether a merged key counts as often as it has tokens.
    """

    summary: str
    method: str = "atc"
    keep_rate: float = 0.5
    features: Features = "input"
    merge: Merge = "qkv"
    refresh_every: int = 1
    share_layers: bool = False
    proportional_attention: bool = False


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "exact": Preset("the papers' form: for comparing methods"),
        "balanced": Preset(
            "pictures close to the unmerged ones",
            keep_rate=0.25,
            features="keys",
            merge="kv",
            refresh_every=5,
            proportional_attention=True,
        ),
        "fast": Preset(
            "a tenth of the attention's cost",
            keep_rate=0.1,
            features="keys",
            merge="kv",
            refresh_every=5,
            proportional_attention=True,
        ),
    }
)
"""By name; `docs/benchmarks.md` has what each costs and saves."""


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]
