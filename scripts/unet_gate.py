"""What must hold before a way to run a UNet is timed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tomesd
import torch
from pipeline_contestants import Contestant, ScikitLearnATC, patch_with_tomesd
from timed_unet import TimedUNet
from torch import Tensor

from sd_tokenmerge import apply_patch

SMALL = (24, 16)
"""Size of the latents in these checks."""

_TWINS: dict[str, dict[str, Any]] = {
    "atc": {"method": "atc"},
    "scikit-learn": {"method": ScikitLearnATC()},
    "tome-sd": {"method": "tome-sd"},
}


def require_sound(calls: TimedUNet, contestants: Sequence[Contestant], case: str) -> None:
    """Refuse to time contestants that do not do what they say.

    Raises:
        SystemExit: an output is not finite, merging did nothing, or something stays after removal.
    """
    plain = _call(calls)
    for one in contestants:
        with one.on(calls.unet):
            merged = _call(calls)
        if not merged.isfinite().all():
            sys.exit(f"{case}: {one.name} is not finite.")
        if torch.equal(merged, plain) != (one.name == "unpatched"):
            sys.exit(f"{case}: {one.name} did nothing.")
        if not torch.equal(_call(calls), plain):
            sys.exit(f"{case}: {one.name} leaves something behind.")


def require_twins_agree(calls: TimedUNet, case: str) -> None:
    """Refuse to compare implementations of the same method that differ.

    Raises:
        SystemExit: ToMe-SD differs from the tomesd package, or ATC from scikit-learn's.
    """
    tolerance = 1e-3 if calls.dtype == torch.float32 else 5e-2
    outputs = {}
    for name, options in _TWINS.items():
        with apply_patch(calls.unet, **options):
            outputs[name] = _call(calls)
    patch_with_tomesd(calls.unet, 0.5, use_rand=False)
    outputs["tomesd"] = _call(calls)
    tomesd.remove_patch(calls.unet)
    for ours, theirs in (("tome-sd", "tomesd"), ("atc", "scikit-learn")):
        error = (outputs[ours] - outputs[theirs]).norm() / outputs[ours].norm()
        if error > tolerance:
            sys.exit(f"{case}: {ours} and {theirs} differ by {error:.1e}.")


def _call(calls: TimedUNet) -> Tensor:
    return calls.call(calls.timesteps()[10], *SMALL)
