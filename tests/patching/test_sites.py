from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from sd_tokenmerge import apply_patch
from sd_tokenmerge.methods import Grid
from sd_tokenmerge.patching.sites import find_denoiser, find_sites, level_grid
from tests.patching.spies import traced
from tests.tiny_models import call_unet, tiny_sd15, tiny_sdxl, tiny_unet

# Blocks with self-attention per level, as in the published models (SDXL's depth is scaled down).
BLOCKS_PER_LEVEL = {
    "sd15": {0: 5, 1: 5, 2: 5, 3: 1},
    "sd21": {0: 5, 1: 5, 2: 5, 3: 1},
    "sdxl": {1: 10, 2: 18},
}


@pytest.mark.parametrize("kind", BLOCKS_PER_LEVEL)
def test_all_self_attentions_are_found(kind):
    unet = tiny_unet(kind)
    sites = find_sites(unet)
    levels = [site.level for site in sites]
    assert {level: levels.count(level) for level in sorted(set(levels))} == BLOCKS_PER_LEVEL[kind]
    for site in sites:
        assert unet.get_submodule(site.path) is site.block
        assert site.attention is site.block.attn1
        assert site.heads == site.attention.heads
        assert site.channels == site.attention.to_q.in_features


@pytest.mark.parametrize("kind", BLOCKS_PER_LEVEL)
def test_sites_are_in_the_order_in_which_they_run(kind):
    unet = tiny_unet(kind)
    ran = []
    for site in find_sites(unet):
        site.block.register_forward_pre_hook(lambda _, __, path=site.path: ran.append(path))
    call_unet(unet, kind)
    assert ran == [site.path for site in find_sites(unet)]


@pytest.mark.parametrize("size", [(16, 16), (18, 26), (15, 9), (33, 20)])
@pytest.mark.parametrize("kind", BLOCKS_PER_LEVEL)
def test_level_grid_is_what_runs_through_the_blocks(kind, size):
    unet = tiny_unet(kind)
    sites = find_sites(unet)
    with ExitStack() as stack:
        traces = [stack.enter_context(traced(site.transformer)) for site in sites]
        call_unet(unet, kind, batch=1, height=size[0], width=size[1])
    for site, trace in zip(sites, traces, strict=True):
        assert Grid(*trace.inputs[0].shape[-2:]) == level_grid(site.level, Grid(*size)), site.path


def test_levels_of_the_published_models(shared):
    for folder, expected in {
        "stable-diffusion-v1-5": {0: 5, 1: 5, 2: 5, 3: 1},
        "stable-diffusion-2-1": {0: 5, 1: 5, 2: 5, 3: 1},
        "stable-diffusion-xl-base-1.0": {1: 10, 2: 60},
    }.items():
        config = json.loads((shared / "model-configs" / folder / "unet/config.json").read_text())
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        levels = [site.level for site in find_sites(unet)]
        assert {level: levels.count(level) for level in sorted(set(levels))} == expected


def test_denoiser_of_pipelines_unets_and_controlnets():
    pipe = tiny_sd15()
    assert find_denoiser(pipe) is pipe.unet
    assert find_denoiser(pipe.unet) is pipe.unet
    assert find_denoiser(torch.compile(pipe.unet)) is pipe.unet
    assert find_denoiser(tiny_sdxl()).config.addition_embed_type == "text_time"
    controlnet = ControlNetModel.from_unet(pipe.unet)
    assert find_denoiser(controlnet) is controlnet
    assert {site.level for site in find_sites(controlnet)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "model", [None, "pipe", torch.nn.Linear(2, 2), tiny_sd15().vae.encoder.mid_block]
)
def test_what_has_no_unet_is_refused(model):
    with pytest.raises(TypeError, match="`pipe` must be a pipeline with a UNet"):
        find_denoiser(model)


def test_a_pipeline_that_was_loaded_without_its_unet_is_refused():
    pipe = StableDiffusionPipeline(
        **{**tiny_sd15().components, "unet": None}, requires_safety_checker=False
    )
    with pytest.raises(TypeError, match="got a StableDiffusionPipeline without its unet"):
        find_denoiser(pipe)


def test_other_architectures_are_refused():
    unconditional = UNet2DModel(
        block_out_channels=(32, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        sample_size=16,
    )
    message = (
        "got a UNet2DModel with attention only in AttnDownBlock2D, AttnUpBlock2D, UNetMidBlock"
    )
    with pytest.raises(ValueError, match=message):
        apply_patch(unconditional)


def test_blocks_that_attend_only_to_the_text_are_left_out():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        sample_size=16,
        attention_head_dim=4,
        only_cross_attention=(True, False),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    assert {site.level for site in find_sites(unet)} == {1}
    report = apply_patch(unet, keep_rate=0.5).report()
    assert {row.level for row in report.rows if row.merged} == {1}
