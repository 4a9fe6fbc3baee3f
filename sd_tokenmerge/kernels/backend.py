"""Which implementation runs where, and what CUDA graphs must leave out."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

OUTSIDE_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)
"""For `custom_op`: a CUDA graph would replay, in every call, what happened while it was recorded.

Versions of torch without this tag record no graph that is given a tensor on the CPU.
"""


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are used for this tensor: on CUDA, where Triton is installed."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
