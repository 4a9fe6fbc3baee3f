"""Which operators a piece of code runs, and which of them Apple's backend (MPS) lacks.

Torch ships the table from which its operators are generated; it says which backends have a kernel.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"


class MissingOnMPS(TorchDispatchMode):
    """Collects operators without an MPS kernel, and tensors in float64, which MPS does not have.

    Attributes:
        missing: names of operators, or of operators with `float64` where that is what is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        if name not in mps_operators():
            self.missing.add(name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                self.missing.add(f"{name} float64")
        return result


@cache
def mps_operators() -> frozenset[str]:
    """Names such as `sum.dim_IntList` of the operators that have a kernel for MPS."""
    entries = re.split(r"^- func: ", _TABLE.read_text(), flags=re.MULTILINE)[1:]
    operators = {entry[: entry.index("(")]: entry for entry in entries}
    return frozenset(name for name in operators if _runs_on_mps(name, operators))


def _runs_on_mps(name: str, operators: dict[str, str]) -> bool:
    entry = operators[name]
    delegate = re.search(r"structured_delegate: (\S+)", entry)
    if delegate:
        return _runs_on_mps(delegate[1], operators)
    if "\n  dispatch:" not in entry:
        return True  # composed of others
    return re.search(r"^    .*\b(MPS|Composite\w+)\b.*:", entry, re.MULTILINE) is not None
