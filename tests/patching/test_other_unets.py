"""UNets that have more than the self-attention of SD: that alone is merged, the rest works."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel

from sd_tokenmerge import apply_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.tiny_models import UNET_CONFIGS, unet_inputs

SMALL = {
    **UNET_CONFIGS["sd15"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def test_animatediff_merges_in_space_and_not_in_time():
    torch.manual_seed(0)
    unet = UNetMotionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=4,
        motion_num_attention_heads=4,
        sample_size=16,
    ).eval()
    assert not any("motion_modules" in site.path for site in find_sites(unet))
    inputs = {
        "sample": torch.randn(1, 4, 3, 16, 16),  # three frames
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 32).expand(3, -1, -1),
    }
    with torch.no_grad():
        plain = unet(**inputs).sample
        with apply_patch(unet, "tome-sd", refresh_every=2) as handle:
            merged = unet(**inputs).sample
        assert torch.equal(unet(**inputs).sample, plain)
    assert not torch.allclose(merged, plain, atol=1e-3)
    rows = [row for row in handle.report().rows if row.merged]
    assert [(row.level, row.tokens_after, row.times_computed) for row in rows] == [(0, 128, 1)] * 3


def test_gligen_still_sees_its_objects():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL, attention_type="gated").eval()
    for module in unet.modules():
        if type(module).__name__ == "GatedSelfAttentionDense":
            module.alpha_attn.data.fill_(3.0)  # zero before training
            module.alpha_dense.data.fill_(3.0)

    def picture(shift):
        boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5]]]).expand(2, 1, 4) + shift
        gligen = {
            "boxes": boxes,
            "positive_embeddings": torch.ones(2, 1, 32),
            "masks": torch.ones(2, 1),
        }
        with torch.no_grad():
            return unet(**unet_inputs(), cross_attention_kwargs={"gligen": gligen}).sample

    plain = picture(0.0)
    with apply_patch(unet, "tome-sd") as handle:
        merged, moved = picture(0.0), picture(0.3)
    assert handle.report().rows[0].tokens_after == 128
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert not torch.allclose(merged, moved, atol=1e-3)
    assert torch.equal(picture(0.0), plain)
