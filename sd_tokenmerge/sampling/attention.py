"""Select how a pipeline computes attention, and check that the device supports it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd_tokenmerge.patching.sites import find_denoiser

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def set_attention(pipe: Any, backend: str, device: str) -> None:
    """Make the denoiser compute attention as `GenerateOptions.attention_backend` says.

    Raises:
        ValueError: the device or the installation does not support it.
    """
    if backend == "eager":
        pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    elif backend == "sliced":
        pipe.enable_attention_slicing()
    try:
        if backend == "xformers":
            pipe.enable_xformers_memory_efficient_attention()
        elif backend in _SDPA_BACKENDS:
            denoiser: Any = find_denoiser(pipe)
            trial = torch.zeros(1, 1, 16, 16, dtype=denoiser.dtype, device=device)
            with attention_context(backend):
                torch.nn.functional.scaled_dot_product_attention(trial, trial, trial)
    except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`attention_backend` {backend!r} cannot be used here: {reason}"
        ) from error


def attention_context(backend: str) -> AbstractContextManager[Any]:
    """Within it, PyTorch's attention uses the kind of kernel that `backend` names, if any."""
    if backend not in _SDPA_BACKENDS:
        return nullcontext()
    context: AbstractContextManager[Any] = sdpa_kernel(_SDPA_BACKENDS[backend])
    return context
