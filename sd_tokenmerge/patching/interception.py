"""Replacing the attention function that runs inside a model's own attention processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Interception(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` calls of this thread run `attend` instead.

    `attend` gets their arguments; calls that it makes itself are not intercepted.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch."""
        if function is _ATTENTION:
            function = self._attend
        elif function is Tensor.unflatten:
            function = torch.unflatten  # dynamo can't trace the method while a mode is active
        return function(*args, **(kwargs or {}))


_ATTENTION = F.scaled_dot_product_attention
