"""Which implementation runs where."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are used for this tensor: on CUDA, where Triton is installed."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
