"""Which implementation runs where."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are used for this tensor: on CUDA, where Triton is installed."""
    return tensor.is_cuda and _has_triton()


def needs_fixed_shapes(tensor: Tensor) -> bool:
    """Whether a shape that depends on data would make the host wait for this tensor's device."""
    return tensor.device.type != "cpu"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
