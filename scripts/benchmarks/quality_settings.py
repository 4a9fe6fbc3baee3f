"""Ways to generate pictures, which the benchmark of their quality compares."""

from __future__ import annotations

from typing import Any

from benchmarks.contestants import Contestant
from sd_tokenmerge import PRESETS

UNMERGED = "unmerged"
"""The setting that the others are compared with."""

DEFAULTS: dict[str, Any] = {
    "method": "atc",
    "keep_rate": 1.0,
    "merge": "qkv",
    "proportional_attention": False,
    "features": "input",
    "refresh_every": 1,
    "share_layers": False,
}
"""Options of `apply_patch` where a setting says nothing."""


def all_settings() -> list[Contestant]:
    """Every setting, most important first."""
    sized = {"merge": "kv", "proportional_attention": True}
    shared = {"features": "keys", "refresh_every": 5, "share_layers": True, **sized}
    complete, tome_sd, random = (
        {"method": method} for method in ("atc:linkage=complete", "tome-sd", "random")
    )
    keys, kept = {"features": "keys"}, {"refresh_every": 5}

    def series(name: str, keep: tuple[int, ...], **options: Any) -> list[Contestant]:
        return [
            Contestant(f"{name}-{rate}", {**DEFAULTS, **options, "keep_rate": rate / 100})
            for rate in keep
        ]

    def preset(name: str) -> Contestant:
        config = PRESETS[name]
        options = {option: getattr(config, option) for option in DEFAULTS} | {
            "keep_rate": config.keep_rate.rate,
            "proportional_attention": config.weights_keys,
        }
        return Contestant(f"preset-{name}", options)

    return [
        Contestant(UNMERGED),
        preset("balanced"),
        preset("fast"),
        Contestant("tomesd-50", tomesd_ratio=0.5),
        Contestant("tomesd-25", tomesd_ratio=0.75),
        *series("kv-sized", (50, 25, 10, 5), **sized),
        *series("qkv", (50, 25, 10, 5)),
        *series("kv", (50, 25, 10, 5), merge="kv"),
        *series("q", (50, 25, 10, 5), merge="q"),
        *series("kv-sized-shared", (50, 25, 10), **shared),
        *series("kv-sized-refresh-5", (50, 25, 10, 5), **kept, **sized),
        *series("kv-sized-keys", (50, 25, 10, 5), **keys, **sized),
        *series("kv-sized-complete", (25, 10), **complete, **sized),
        *series("kv-sized-tome-sd", (50, 25), **tome_sd, **sized),
        *series("kv-sized-random", (50, 25, 10, 5), **random, **sized),
        *series("qkv-tome-sd", (50,), **tome_sd),
        *series("qkv-keys", (50, 10), **keys),
        *series("qkv-refresh-5", (50, 10), **kept),
        *series("qkv-complete", (50,), **complete),
        *series("qkv-random", (50, 10), **random),
    ]


def setting_columns(setting: Contestant) -> dict[str, str]:
    """The columns that describe a setting."""
    columns = {"setting": setting.name, "keep_rate": "1", "attention_cost": "1"}
    if setting.name == UNMERGED:
        return columns | {"method": "none", "sizes": "False", "refresh_every": "1"}
    options = setting.options or {**DEFAULTS, "keep_rate": 1 - (setting.tomesd_ratio or 0.0)}
    return columns | {
        "method": str(options["method"]) if setting.options else "tomesd",
        "merge": str(options["merge"]),
        "sizes": str(options["proportional_attention"]),
        "features": str(options["features"]),
        "keep_rate": f"{options['keep_rate']:g}",
        "refresh_every": str(options["refresh_every"]),
        "attention_cost": f"{attention_cost(options):.4g}",
    }


def attention_cost(options: dict[str, Any]) -> float:
    """Products of queries and keys, relative to attention over all tokens."""
    keep_rate: float = options["keep_rate"]
    return keep_rate**2 if options["merge"] == "qkv" else keep_rate
