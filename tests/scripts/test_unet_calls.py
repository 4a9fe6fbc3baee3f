"""Calls of UNets of every architecture, on inputs of their own sizes."""

from __future__ import annotations

import pytest
from benchmarks.unet_calls import UNetCalls

from sd_tokenmerge.bench.calls import finest_transformers
from tests.tiny_models import UNET_CONFIGS, tiny_unet


@pytest.mark.parametrize("kind", UNET_CONFIGS)
def test_inputs_fit(kind):
    calls = UNetCalls(tiny_unet(kind), latent=16, batch=2)
    timestep = calls.timesteps()[0]
    assert calls.call(timestep, (24, 16)).shape == (2, 4, 24, 16)
    assert calls.timed(timestep).wall > 0
    assert finest_transformers(calls.denoiser)[0] == (1 if kind == "sdxl" else 0)
