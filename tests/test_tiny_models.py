"""The tiny models work, and are built like the published ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from tests.tiny_models import (
    UNET_CONFIGS,
    call_unet,
    tiny_sd15,
    tiny_sd21,
    tiny_sdxl,
    tiny_tokenizer,
    tiny_unet,
)

PUBLISHED = {
    "sd15": "stable-diffusion-v1-5",
    "sd21": "stable-diffusion-2-1",
    "sdxl": "stable-diffusion-xl-base-1.0",
}
SCALED_DOWN = {
    "block_out_channels",
    "attention_head_dim",
    "norm_num_groups",
    "cross_attention_dim",
    "sample_size",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "transformer_layers_per_block",
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_structure_is_that_of_the_published_config(kind, shared):
    folder = shared / "model-configs" / PUBLISHED[kind]
    published = json.loads((folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        real = dict(UNet2DConditionModel.from_config(published).config)
    tiny = dict(tiny_unet(kind).config)
    # What differs between the two must be a size, never a kind of layer.
    differing = {key for key in real if not key.startswith("_") and real[key] != tiny[key]}
    assert differing <= SCALED_DOWN
    for key in ("block_out_channels", "attention_head_dim", "transformer_layers_per_block"):
        assert np.shape(real[key]) == np.shape(tiny[key]), key

    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    tiny_pipe = {"sd15": tiny_sd15, "sd21": tiny_sd21, "sdxl": tiny_sdxl}[kind]()
    assert type(tiny_pipe.scheduler).__name__ == scheduler["_class_name"]
    prediction = scheduler.get("prediction_type", "epsilon")
    assert tiny_pipe.scheduler.config.prediction_type == prediction


@pytest.mark.parametrize("kind", UNET_CONFIGS)
def test_unet_is_seeded_and_depends_on_its_input(kind):
    first, second = tiny_unet(kind), tiny_unet(kind)
    output = call_unet(first, kind)
    assert output.shape == (2, 4, 16, 16)
    assert output.isfinite().all()
    assert torch.equal(output, call_unet(second, kind))
    assert not torch.allclose(output, call_unet(first, kind, timestep=100), atol=1e-3)
    assert not torch.allclose(output[0], output[1], atol=1e-3)


@pytest.mark.parametrize("build", [tiny_sd15, tiny_sd21, tiny_sdxl])
def test_pipeline_makes_pictures(build):
    pipe = build()

    def picture(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=3, generator=generator, output_type="np").images[0]

    dog = picture("A high quality photograph of a dog.")
    assert dog.shape == (128, 128, 3)
    assert np.isfinite(dog).all()
    assert dog.std() > 0.01
    assert np.array_equal(dog, picture("A high quality photograph of a dog."))
    assert not np.array_equal(dog, picture("A cat."))


def test_pipeline_survives_saving(tmp_path):
    pipe = tiny_sd15()
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    pictures = [
        p("a dog", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for p in (pipe, loaded)
    ]
    assert np.array_equal(*pictures)


def test_tokenizer_spells_and_pads():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Dog", padding="max_length", max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:4]) == ["d", "o", "g</w>"]
    assert ids[4:] == [tokenizer.eos_token_id] * 73
