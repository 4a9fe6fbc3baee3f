"""Checks before a patched denoiser is timed. Imports only `calls`, as the package explains."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from sd_tokenmerge.bench.calls import Calls

SMALL = (24, 16)
"""Height and width in these checks: of a UNet's latents, of a transformer's tokens."""


class Patcher(Protocol):
    """A way to patch a denoiser."""

    @property
    def name(self) -> str:
        """Its name in rows; `"unpatched"` if it changes nothing."""

    def on(self, denoiser: Any) -> AbstractContextManager[None]:
        """Patches the denoiser for as long as the context lasts."""


class UnsoundError(RuntimeError):
    """A contestant that does not merge as it should."""


def require_sound(calls: Calls, contestants: Iterable[Patcher]) -> None:
    """Refuse to time contestants that do not merge as they should.

    Raises:
        UnsoundError: an output is not finite, merging did nothing, or removal does not restore the
            output to the last bit.
    """
    timestep = calls.timesteps()[10]
    plain = calls.call(timestep, SMALL)
    for one in contestants:
        with one.on(calls.denoiser):
            merged = calls.call(timestep, SMALL)
        if not merged.isfinite().all():
            raise UnsoundError(f"{one.name}: the output is not finite.")
        if torch.equal(merged, plain) != (one.name == "unpatched"):
            raise UnsoundError(f"{one.name}: merging did nothing.")
        if not torch.equal(calls.call(timestep, SMALL), plain):
            raise UnsoundError(f"{one.name}: removing the patch does not restore the output.")
