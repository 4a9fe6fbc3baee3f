"""The embedded sample pipeline: what a fresh checkout must be able to do with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sd_tokenmerge import apply_patch
from sd_tokenmerge.sampling.imagenet import class_prompt
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions

PIPELINE = Path(__file__).resolve().parents[1] / "samples" / "pipeline"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, class_index=301, size=256, steps=8):
    result = pipe(
        class_prompt(class_index),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3010),
    )
    return np.asarray(result.images[0], np.float64)


def test_it_is_small_and_says_how_it_is_run():
    size = sum(path.stat().st_size for path in PIPELINE.rglob("*") if path.is_file())
    assert size <= 25 * 2**20
    settings = json.loads((PIPELINE / "sample.json").read_text())
    assert len(settings["classes"]) >= 12
    assert settings["size"] == 256


def test_its_weights_fit():
    load_pipeline(GenerateOptions(out="-", model=str(PIPELINE), device="cpu"))


def test_a_ladybug_is_red(pipe):
    picture = draw(pipe)
    red, green, blue = picture.reshape(-1, 3).T
    assert ((red > 1.5 * green) & (red > 1.5 * blue) & (red > 120)).mean() > 0.05


def test_merging_changes_a_picture_and_removal_restores_it(pipe):
    plain = draw(pipe)
    with apply_patch(pipe, "atc", keep_rate=0.5) as handle:
        merged = draw(pipe)
        rows = [row for row in handle.report().rows if row.merged]
    assert all((row.tokens_before, row.tokens_after) == (1024, 512) for row in rows)
    assert len(rows) == 3
    assert 0.1 < np.abs(plain - merged).mean() < 60
    np.testing.assert_array_equal(plain, draw(pipe))


@pytest.mark.slow
def test_it_runs_at_512_pixels(pipe):
    picture = draw(pipe, size=512, steps=25)
    assert picture.shape == (512, 512, 3)
    assert picture.std() > 20
