"""Ways to generate pictures that `quality` compares: merging, and what users would do instead."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.caches import AttentionReuse, DeepCache
from sd_tokenmerge import PRESETS, MergeConfig
from sd_tokenmerge.bench.contestants import Tomesd
from sd_tokenmerge.bench.recipes import Recipe

UNMERGED = "unmerged"
"""The recipe that the others are compared with."""
DPM = "DPMSolverMultistep"
TWO_SIDED, KV, Q, QKV = (
    MergeConfig(merge=merge, features="keys") for merge in ("two-sided", "kv", "q", "qkv")
)
INPUT = MergeConfig(merge="two-sided")
LLOYD = replace(INPUT, method="tome-sd:stride=4,lloyd=2")
"""These two cluster the block's input, the four above the keys."""


def merged(name: str, config: MergeConfig, *percents: float, refresh: int = 1) -> list[Recipe]:
    """A recipe for each percentage of tokens kept."""
    suffix = "" if refresh == 1 else f"-refresh-{refresh}"
    config = replace(config, refresh_every=refresh)
    return [
        Recipe(f"{name}-{kept:g}{suffix}", replace(config, keep_rate=kept / 100))
        for kept in percents
    ]


def instead(steps: tuple[int, ...], dpm: tuple[int, ...], every: tuple[int, ...]) -> list[Recipe]:
    """Without merging: fewer steps, another scheduler, outputs reused over steps."""
    return [
        *(Recipe(f"steps-{n}", steps=n) for n in steps),
        *(Recipe(f"dpm-{n}", steps=n, scheduler=DPM) for n in dpm),
        *(Recipe(f"reuse-{n}", modification=AttentionReuse(n)) for n in every),
        *(Recipe(f"deepcache-{n}", modification=DeepCache(n)) for n in every),
    ]


def with_fewer_steps(preset: str, *steps: int) -> list[Recipe]:
    """A preset in fewer steps."""
    return [Recipe(f"steps-{n}-{preset}", PRESETS[preset], steps=n) for n in steps]


def recipes(size: int) -> list[Recipe]:
    """Every recipe for pictures of `size` pixels, most important first; fewer above 256."""
    main = [
        Recipe(UNMERGED),
        *instead((22, 20, 18, 15, 12), (20, 15, 10), (2, 3)),
        *(Recipe(f"preset-{name}", config) for name, config in PRESETS.items()),
        Recipe("tomesd-50", modification=Tomesd(0.5)),
        *with_fewer_steps("balanced", 20, 15),
        *merged("two-sided-lloyd", LLOYD, 25, 12.5, refresh=2),
        *merged("two-sided-tome-sd-4", replace(INPUT, method="tome-sd:stride=4"), 12.5, 6.25),
        *merged("two-sided-tome-sd-input", replace(INPUT, method="tome-sd"), 25),
        *merged("two-sided-input", INPUT, 12.5, refresh=2),
        *merged("two-sided-input", INPUT, 12.5, refresh=3),
        *merged("two-sided", TWO_SIDED, 12.5, 5),
        *merged("two-sided", TWO_SIDED, 12.5, refresh=3),
        *merged("kv-zeroth", replace(KV, first_order=False), 26.6),
    ]
    if size > 256:
        return main
    return [
        *main,
        *merged("two-sided-input", INPUT, 5, refresh=3),
        *merged("two-sided-tome-sd", replace(TWO_SIDED, method="tome-sd"), 25),
        *merged("two-sided-lloyd-keys", replace(LLOYD, features="keys"), 6.25, refresh=2),
        *merged("kv", KV, 25),
        *merged("kv-tome-sd", replace(KV, method="tome-sd"), 25),
        *merged("q", Q, 25),
        *merged("two-sided-complete", replace(INPUT, method="atc:linkage=complete"), 12.5),
        *merged("two-sided-grid", replace(INPUT, method="grid"), 25),
        *instead((), (), (5,)),
    ]
