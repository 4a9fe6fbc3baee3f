"""Every method in every combination of its switches: new ones are picked up from `METHODS`."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from sd_tokenmerge.methods import METHODS, Grid, Method, ToMeSD, partition
from sd_tokenmerge.options import option_types
from sd_tokenmerge.partitions import Partition


def _values(hint: object) -> tuple[Any, ...]:
    if hint is bool:
        return (False, True)
    return get_args(hint) if get_origin(hint) is Literal else ()


def _variants(method_class: type[Method]) -> list[Method]:
    choices = {option: _values(hint) for option, hint in option_types(method_class).items()}
    choices = {option: values for option, values in choices.items() if values}
    return [
        method_class(**dict(zip(choices, values, strict=True)))
        for values in product(*choices.values())
    ]


VARIANTS = [variant for method_class in METHODS.values() for variant in _variants(method_class)]
VARIANTS.append(ToMeSD(lloyd=2))


def random_tokens(batch: int, grid: Grid, channels: int = 8, seed: int = 0) -> Tensor:
    """Continuous random tokens `[B, N, C]`, float32: no ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid.num_tokens, channels, generator=generator)


def run(method: Method, tokens: Tensor, num_clusters: int, grid: Grid, seed: int = 0) -> Partition:
    """The public `partition`, with random scores for the methods that need them."""
    generator = torch.Generator().manual_seed(17)
    scores = torch.rand(grid.num_tokens, generator=generator).expand(tokens.shape[:2])
    return partition(
        tokens,
        method,
        num_clusters=num_clusters,
        grid=grid,
        seed=seed,
        scores=scores if method.uses_scores else None,
    )
