"""Observers of a running model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class SpyMethod(Method):
    """Puts token i into cluster i mod K, and remembers what it was given."""

    name = "spy"
    scored: bool = False
    seeded: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "calls", [])

    @property
    def uses_scores(self):
        return self.scored

    @property
    def uses_seed(self):
        return self.seeded

    def _cluster(self, tokens, num_clusters, grid, seed, scores):
        self.calls.append(Call(tokens.clone(), num_clusters, grid, seed, scores))
        labels = torch.arange(tokens.shape[1], device=tokens.device).remainder(num_clusters)
        return Partition(labels.expand(tokens.shape[0], -1).contiguous(), num_clusters)


@dataclass
class Call:
    tokens: torch.Tensor
    num_clusters: int
    grid: Grid
    seed: int
    scores: torch.Tensor | None


@dataclass
class Trace:
    """Inputs and outputs of a module, call by call."""

    inputs: list = field(default_factory=list)
    keywords: list = field(default_factory=list)
    outputs: list = field(default_factory=list)


@contextmanager
def traced(module):
    """Record what runs through a module's `forward`."""
    trace = Trace()

    def hook(module, args, kwargs, output):
        trace.inputs.append(args[0] if args else kwargs["hidden_states"])
        trace.keywords.append(kwargs)
        trace.outputs.append(output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield trace
    finally:
        handle.remove()
