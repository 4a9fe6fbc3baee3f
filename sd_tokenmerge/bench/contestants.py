"""Ways to patch a denoiser, which are timed against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.bench.calls import Calls, finest_transformers, timed_step
from sd_tokenmerge.bench.turns import Cost
from sd_tokenmerge.config import PRESETS, MergeConfig
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.patching.sites import find_denoiser

UNPATCHED = "unpatched"

Modification = Callable[[Any], AbstractContextManager[None]]
"""Changes a pipeline or denoiser for as long as the context lasts."""


@dataclass(frozen=True)
class Tomesd:
    """The tomesd package with its defaults, on the same self-attentions as our default.

    Attributes:
        keep_rate: fraction of the tokens that is kept, in (0, 1).
    """

    keep_rate: float

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Patch a pipeline or UNet; draws from torch's global generator, so that is seeded."""
        import tomesd

        # the package's default, level 0, has no attention in SDXL
        level, _ = finest_transformers(find_denoiser(model))
        torch.manual_seed(0)
        tomesd.apply_patch(model, ratio=1 - self.keep_rate, max_downsample=2**level)
        try:
            yield
        finally:
            tomesd.remove_patch(model)


@dataclass(frozen=True)
class Contestant:
    """One way to patch a denoiser.

    Attributes:
        name: in the rows.
        config: of `apply_patch`.
        modification: applied besides it.
    """

    name: str
    config: MergeConfig | None = None
    modification: Modification | None = None

    @property
    def refresh_every(self) -> int:
        """Steps for which a partition is used."""
        return 1 if self.config is None else self.config.refresh_every

    @contextmanager
    def on(self, denoiser: Any) -> Iterator[None]:
        """Patch the denoiser for as long as the context lasts."""
        with ExitStack() as stack:
            if self.modification is not None:
                stack.enter_context(self.modification(denoiser))
            if self.config is not None:
                stack.enter_context(apply_patch(denoiser, self.config))
            yield


class Step:
    """A denoising step under a contestant, which records its costs.

    Attributes:
        contestant: patches the denoiser.
        costs: of every call: with a new partition, and with a kept one if there are any.
    """

    def __init__(self, calls: Calls, contestant: Contestant) -> None:
        """Time `contestant` on these calls."""
        self._calls, self.contestant = calls, contestant
        self.costs: list[Cost] = []

    def __call__(self) -> Cost:
        """Cost of one step, averaged over the life of a partition."""
        with self.contestant.on(self._calls.denoiser):
            step, costs = timed_step(self._calls, self.contestant.refresh_every)
        self.costs += costs
        return step


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


def preset_contestants() -> list[Contestant]:
    """The unpatched denoiser, each preset with its oracle, and the tomesd package if it is there.

    The tomesd package patches UNets only.
    """
    presets = [Contestant(f"preset-{name}", config) for name, config in PRESETS.items()]
    oracles = {one.name: one for one in map(oracle, PRESETS.values())}
    peers = [Contestant("tomesd-50", modification=Tomesd(0.5))] if find_spec("tomesd") else []
    return [Contestant(UNPATCHED), *oracles.values(), *presets, *peers]
