"""UNets that have more than the self-attention of SD: that alone is merged, the rest works."""

from __future__ import annotations

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel

from sd_tokenmerge import Linear, apply_patch
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


class StableVideo:
    """The least that counts as its pipeline."""

    def __init__(self):
        torch.manual_seed(0)
        self.unet = diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=(2, 4),
            sample_size=8,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ).eval()
        self.scheduler = diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
        )
        self.scheduler.set_timesteps(4)


@torch.no_grad()
def test_stable_video_diffusion_merges_in_space_and_not_in_time():
    video = StableVideo()
    attentions = [site.attention for site in find_sites(video.unet)]
    temporal = [
        module.attn1
        for module in video.unet.modules()
        if type(module).__name__ == "TemporalBasicTransformerBlock"
    ]
    assert len(attentions) == len(temporal) == 4
    assert not set(attentions) & set(temporal)

    def frames(timestep):
        inputs = {
            "sample": torch.linspace(-2, 2, 2 * 8 * 64).sin().view(1, 2, 8, 8, 8),
            "timestep": timestep,
            "encoder_hidden_states": torch.ones(1, 1, 32),
            "added_time_ids": torch.ones(1, 3),
        }
        return video.unet(**inputs).sample

    timesteps, rate, rates = video.scheduler.timesteps, Linear(0.25, 0.75), []
    assert timesteps.min() < 0 < timesteps.max(), "they are logarithms of sigma"
    plain = frames(timesteps[0])
    with apply_patch(video, "grid", keep_rate=1):
        assert torch.equal(frames(timesteps[0]), plain)
    hook = attentions[0].register_forward_pre_hook(
        lambda module, _: rates.append(module._merged_block.rate)
    )
    with apply_patch(video, "grid", keep_rate=rate, refresh_every=2) as handle:
        merged = [frames(timestep) for timestep in timesteps]
        assert not torch.allclose(merged[0], plain, atol=1e-3)
    with apply_patch(video, "grid", keep_rate=rate, refresh_every=2):
        for timestep, output in zip(timesteps.tolist(), merged, strict=True):
            assert torch.equal(frames(timestep), output)
    hook.remove()
    assert torch.equal(frames(timesteps[0]), plain)
    assert rates == [rate.at(step / 4, 0.0) for step in range(4)] * 2
    rows = [row for row in handle.report().rows if row.merged]
    assert [(row.grid[:2], row.tokens_before) for row in rows] == [((8, 8), 64)] * 3
    assert all(row.times_computed + row.times_reused == 4 for row in rows)


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
