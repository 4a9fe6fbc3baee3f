"""Ways to generate pictures, which the benchmark of their quality compares."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomesd
import torch

from sd_tokenmerge import PRESETS
from sd_tokenmerge.sampling.options import GenerateOptions

UNMERGED = "unmerged"
"""The setting that the others are compared with."""


@dataclass(frozen=True)
class Setting:
    """One way to generate; the fields are options of `apply_patch`.

    Attributes:
        name: in the rows.
        tomesd: whether the tomesd package patches the pipeline instead.
    """

    name: str
    method: str = "none"
    keep_rate: float = 1.0
    merge: str = "qkv"
    proportional_attention: bool = False
    features: str = "input"
    refresh_every: int = 1
    share_layers: bool = False
    tomesd: bool = False

    @property
    def attention_cost(self) -> float:
        """Products of queries and keys, relative to attention over all tokens."""
        return self.keep_rate**2 if self.merge == "qkv" else self.keep_rate

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """The pipeline, patched where tomesd does it."""
        if not self.tomesd:
            yield
            return
        torch.manual_seed(0)  # it draws from the global generator
        tomesd.apply_patch(pipe, ratio=1 - self.keep_rate)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)

    def patch(self) -> dict[str, Any]:
        """Options of `apply_patch`."""
        own = asdict(self)
        del own["name"], own["tomesd"]
        return own

    def generation(self, arguments: Namespace, folder: Path) -> GenerateOptions:
        """How its pictures are made."""
        own = self.patch()
        if self.tomesd:
            own |= {"method": "none", "keep_rate": 1.0}
        return GenerateOptions(
            out=str(folder),
            model=str(arguments.model),
            classes=(301, 323) if arguments.quick else None,
            images_per_class=arguments.images_per_class,
            steps=2 if arguments.quick else None,
            batch_size=arguments.batch_size,
            device=arguments.device,
            **own,
        )


def all_settings() -> list[Setting]:
    """Every setting, most important first."""
    sized: dict[str, Any] = {"merge": "kv", "proportional_attention": True}
    shared: dict[str, Any] = {"refresh_every": 5, "share_layers": True}

    def series(name: str, keep_rates: tuple[int, ...], **options: Any) -> list[Setting]:
        options = {"method": "atc"} | options
        return [Setting(f"{name}-{keep}", keep_rate=keep / 100, **options) for keep in keep_rates]

    def preset(name: str) -> Setting:
        options = asdict(PRESETS[name])
        del options["summary"]
        return Setting(f"preset-{name}", **options)

    return [
        Setting(UNMERGED),
        *series("kv-sized", (50, 25, 10, 5), **sized),
        *series("qkv", (50, 25, 10, 5)),
        preset("balanced"),
        preset("fast"),
        *series("tomesd", (50, 25), method="tome-sd:random=true", tomesd=True),
        *series("kv", (25, 10), merge="kv"),
        *series("kv-sized-tome-sd", (25,), method="tome-sd", **sized),
        *series("kv-sized-random", (25, 10), method="random", **sized),
        *series("kv-sized-keys", (10,), features="keys", **sized),
        *series("kv-sized-refresh-5", (10,), refresh_every=5, **sized),
        *series("kv-sized-complete", (10,), method="atc:linkage=complete", **sized),
        *series("q", (25,), merge="q"),
        *series("qkv-tome-sd", (50,), method="tome-sd"),
        *series("kv", (50, 5), merge="kv"),
        *series("q", (50, 10, 5), merge="q"),
        *series("kv-sized-tome-sd", (50,), method="tome-sd", **sized),
        *series("kv-sized-complete", (25,), method="atc:linkage=complete", **sized),
        *series("kv-sized-keys", (50, 25, 5), features="keys", **sized),
        *series("kv-sized-refresh-5", (50, 25, 5), refresh_every=5, **sized),
        *series("kv-sized-shared", (50, 25, 10), features="keys", **shared, **sized),
        *series("kv-sized-random", (50, 5), method="random", **sized),
        *series("qkv-keys", (50, 10), features="keys"),
        *series("qkv-refresh-5", (50, 10), refresh_every=5),
        *series("qkv-complete", (50,), method="atc:linkage=complete"),
        *series("qkv-random", (50, 10), method="random"),
    ]
