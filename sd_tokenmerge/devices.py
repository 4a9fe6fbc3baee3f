"""Which torch device to run on. Imports torch only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best_device() -> str:
    """The first of `"cuda"`, `"mps"` and `"cpu"` that this machine has."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on, checked to exist on this machine.

    Args:
        device: as torch writes it: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`; None for `best_device`.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    import torch

    if device is None:
        return torch.device(best_device())
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"`device` must be a torch device such as cpu, cuda, cuda:1 or mps, got {device!r}."
        ) from None
    kind = resolved.type
    if kind == "cpu":
        return resolved
    backend = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    if backend is None or not hasattr(backend, "is_available") or not backend.is_available():
        raise ValueError(
            f"`device` must be available, got {str(device)!r}: torch finds no {kind} device on "
            "this machine."
        )
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    if (resolved.index or 0) >= count:
        raise ValueError(
            f"`device` must be available, got {str(device)!r}: torch finds {count} {kind} "
            f"device{'' if count == 1 else 's'} on this machine."
        )
    return resolved


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or this machine, has too little memory."""
    import torch

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "allocate memory" in str(error)  # as torch says on the CPU
