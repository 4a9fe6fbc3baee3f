"""Ways to generate pictures, which the benchmark of their quality compares."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.contestants import CONTESTANTS, Contestant, keep_rate_of
from sd_tokenmerge import MergeConfig

UNMERGED = "unmerged"
"""The setting that the others are compared with."""


def all_settings() -> list[Contestant]:
    """Every setting, most important first."""
    qkv, kv, q = (MergeConfig(merge=merge) for merge in ("qkv", "kv", "q"))
    complete, tome_sd, random = "atc:linkage=complete", "tome-sd", "random"

    def series(name: str, keep: tuple[int, ...], config: MergeConfig) -> list[Contestant]:
        return [
            Contestant(f"{name}-{rate}", replace(config, keep_rate=rate / 100)) for rate in keep
        ]

    return [
        Contestant(UNMERGED),
        *(CONTESTANTS[n] for n in ("preset-balanced", "preset-fast", "tomesd-50", "tomesd-25")),
        *series("kv-sized", (50, 25, 10, 5), kv),
        *series("qkv", (50, 25, 10, 5), qkv),
        *series("kv", (50, 25, 10, 5), replace(kv, proportional_attention=False)),
        *series("q", (50, 25, 10, 5), q),
        *series(
            "kv-sized-shared",
            (50, 25, 10),
            replace(kv, features="keys", refresh_every=5, share_layers=True),
        ),
        *series("kv-sized-refresh-5", (50, 25, 10, 5), replace(kv, refresh_every=5)),
        *series("kv-sized-keys", (50, 25, 10, 5), replace(kv, features="keys")),
        *series("kv-sized-complete", (25, 10), replace(kv, method=complete)),
        *series("kv-sized-tome-sd", (50, 25), replace(kv, method=tome_sd)),
        *series("kv-sized-random", (50, 25, 10, 5), replace(kv, method=random)),
        *series("qkv-tome-sd", (50,), replace(qkv, method=tome_sd)),
        *series("qkv-keys", (50, 10), replace(qkv, features="keys")),
        *series("qkv-refresh-5", (50, 10), replace(qkv, refresh_every=5)),
        *series("qkv-complete", (50,), replace(qkv, method=complete)),
        *series("qkv-random", (50, 10), replace(qkv, method=random)),
    ]


def setting_columns(setting: Contestant) -> dict[str, str]:
    """The columns that describe a setting."""
    method, config = "tomesd", setting.config
    if setting.tomesd_ratio is not None:
        config = MergeConfig(keep_rate=1 - setting.tomesd_ratio)
    elif config is None:
        method, config = "none", MergeConfig(keep_rate=1.0)
    else:
        method = str(config.method)
    return {
        "setting": setting.name,
        "method": method,
        "merge": config.merge,
        "sizes": str(config.weights_keys),
        "features": config.features,
        "keep_rate": f"{keep_rate_of(config):g}",
        "refresh_every": str(config.refresh_every),
        "attention_cost": f"{attention_cost(config):.4g}",
    }


def attention_cost(config: MergeConfig) -> float:
    """Products of queries and keys, relative to attention over all tokens."""
    keep_rate = keep_rate_of(config)
    return keep_rate**2 if config.merge == "qkv" else keep_rate
