"""Stop building a network when it gets larger than any network can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_MOST_TENSORS = 10_000
"""The largest networks in diffusers' and transformers' pipelines have a few thousand."""

_MOST_WEIGHTS_PER_BYTE = 8
"""Weights of one bit, and no network has smaller ones."""


@contextmanager
def limited_size(num_bytes: int | None = None) -> Iterator[None]:
    """Limit the size of the networks that are built inside.

    A wrong number of layers or channels in a configuration would otherwise fill the memory, or
    build layers for hours, before anything compares the network with its weights.

    Args:
        num_bytes: size of the files that hold the weights; None if there are none.

    Raises:
        ValueError: the networks get more tensors, or more weights, than these files can hold.
    """
    tensors = weights = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, weights
        if parameter is None:
            return
        tensors, weights = tensors + 1, weights + parameter.numel()
        if tensors > _MOST_TENSORS:
            raise ValueError(f"its configuration asks for more than {_MOST_TENSORS:,} tensors.")
        if num_bytes is not None and weights > _MOST_WEIGHTS_PER_BYTE * num_bytes:
            raise ValueError("its configuration asks for more weights than its files can hold.")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
