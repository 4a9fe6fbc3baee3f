"""The real SD 1.5 architecture with random weights: minutes and 8 GB of memory on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from sd_tokenmerge import Grid, apply_patch
from tests.patching.test_apply import fingerprint


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sd15_at_512_px(shared):
    path = shared / "model-configs" / "stable-diffusion-v1-5" / "unet" / "config.json"
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(json.loads(path.read_text())).eval()
    before = fingerprint(unet)
    inputs = {
        "sample": torch.randn(2, 4, 64, 64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 768),
    }
    with torch.no_grad():
        plain = unet(**inputs).sample
        with apply_patch(unet, "atc", keep_rate=0.5) as handle:
            merged = unet(**inputs).sample
    report = handle.report()
    print(report)
    assert str(report).startswith("5 of 16 self-attention blocks merged: atc, keep rate 0.5")
    for row in report.rows:
        if row.merged:
            assert (row.level, row.grid) == (0, Grid(64, 64))
            assert (row.tokens_before, row.tokens_after) == (4096, 2048)
            assert (row.times_computed, row.times_reused) == (1, 0)
    assert merged.shape == plain.shape
    assert merged.isfinite().all()
    assert not torch.equal(merged, plain)
    assert (merged - plain).norm() < plain.norm()  # another picture, not noise
    assert fingerprint(unet) == before
