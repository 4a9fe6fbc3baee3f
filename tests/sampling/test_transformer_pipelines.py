"""Runs with pipelines of transformers, which differ in prompts, guidance, sizes and schedulers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_tokenmerge.config import make_config
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.patching.families import find_family
from sd_tokenmerge.sampling.description import read_description
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.merging import patched
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.pipelines import TRANSFORMER_PIPELINES
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.sampler import Sampler
from tests.tiny_pipelines import PIPELINES
from tests.tiny_transformers import tiny_transformer

FAST = ("flux", "pixart", "sd3")
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in sorted(PIPELINES)
]
MERGING = make_config("tome-sd", merge="two-sided", keep_rate=0.5)
JOB = ImageJob(0, 0, 1, "a cat")

Saved = Callable[[str], Path]
Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saves a pipeline; its folder must not be changed."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        PIPELINES[name]().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def load(saved: Saved) -> Load:
    """Loads a pipeline, once."""
    return cache(lambda name: load_pipeline(options(saved(name))))


def options(model: Path | str, **changes: Any) -> GenerateOptions:
    values: dict[str, Any] = {
        "out": "-",
        "model": str(model),
        "device": "cpu",
        "classes": (0, 1),
        "images_per_class": 1,
        "height": 64,
        "width": 96,
        "steps": 2,
        "guidance_scale": 7.5,
        "merging": None,
    }
    return GenerateOptions(**values | changes)


def read_pixels(file: Path) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture, dtype=int)


@pytest.mark.parametrize("merging", [None, MERGING], ids=["unmerged", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_resume_and_do_not_depend_on_the_batch(
    name: str, merging: Any, saved: Saved, load: Load, tmp_path: Path
) -> None:
    together = options(saved(name), out=str(tmp_path / "run"), merging=merging, batch_size=2)
    assert generate(together, pipe=load(name)).generated == 2
    first, second = sorted((tmp_path / "run").glob("*.png"))
    before = read_pixels(second)
    assert before.shape == (64, 96, 3)
    assert np.abs(before - read_pixels(first)).max() > 5
    second.unlink()
    resumed = generate(replace(together, batch_size=1), pipe=load(name))
    assert (resumed.already_there, resumed.generated) == (1, 1)
    assert np.abs(before - read_pixels(second)).max() <= 1
    description = read_description(tmp_path / "run")
    assert description is not None
    assert description.options.merging == (merging and merging.resolved())
    assert "transformer/config.json" in description.model["pipeline"]["files"]


GUIDANCE: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 7.5, "negative_prompt": ""},
    "qwen_image": {"true_cfg_scale": 7.5, "negative_prompt": ""},
    "pixart": {"guidance_scale": 7.5, "use_resolution_binning": False, "clean_caption": False},
    "hunyuandit": {"guidance_scale": 7.5, "use_resolution_binning": False},
}


def bare_call(pipe: Any, **arguments: Any) -> Any:
    """Diffusers' own call for the picture of `JOB`, of 96x64 pixels in two steps."""
    return pipe(
        JOB.prompt,
        generator=torch.Generator().manual_seed(JOB.seed),
        height=64,
        width=96,
        num_inference_steps=2,
        output_type="np",
        **arguments,
    )


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_bare_pipeline_calls(name: str, saved: Saved, load: Load) -> None:
    pipe, resolved = load(name), resolve_options(options(saved(name)))
    bare = bare_call(pipe, **GUIDANCE.get(name, {"guidance_scale": 7.5}))
    np.testing.assert_array_equal(Sampler(pipe, resolved)([JOB]).pixels, bare.images)
    unguided = Sampler(pipe, replace(resolved, guidance_scale=1.0))([JOB]).pixels
    assert np.abs(unguided - bare.images).max() > 1e-4
    with patched(pipe, replace(resolved, merging=MERGING.resolved())):
        merged = Sampler(pipe, resolved)([JOB]).pixels
    assert np.abs(merged - bare.images).max() > 1e-5


class _StopError(Exception):
    """Ends a pipeline's call at its first call of the transformer."""


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_given_is_what_a_bare_pipeline_call_does(
    name: str, saved: Saved, load: Load
) -> None:
    bare_options = {"height": None, "width": None, "steps": None, "guidance_scale": None}
    pipe, resolved = load(name), resolve_options(options(saved(name), **bare_options))
    as_given = {key: value for key, value in GUIDANCE.get(name, {}).items() if value in (False, "")}
    tokens = []

    def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        family = find_family(module)
        assert family is not None
        tokens.append(family.grid(module, args, kwargs))
        raise _StopError

    hook = pipe.transformer.register_forward_pre_hook(capture, with_kwargs=True)
    with pytest.raises(_StopError):
        pipe("a cat", **as_given)
    hook.remove()
    assert tokens == [Grid(resolved.height // 16, resolved.width // 16)]
    assert len(pipe.scheduler.timesteps) == resolved.steps

    small = replace(resolved, height=64, width=96, steps=2)
    bare = bare_call(pipe, **as_given)
    np.testing.assert_array_equal(Sampler(pipe, small)([JOB]).pixels, bare.images)


@pytest.mark.parametrize("name", NAMES)
def test_negative_prompts_steer_or_are_refused(name: str, saved: Saved, load: Load) -> None:
    pipe = load(name)
    resolved = resolve_options(options(saved(name), negative_prompt="blue"))
    if name == "flux_distilled":
        with pytest.raises(ValueError, match=r"`negative_prompt` must not be given: this FluxPipe"):
            Sampler(pipe, resolved)
        return
    steered = Sampler(pipe, resolved)([JOB, JOB]).pixels
    plain = Sampler(pipe, replace(resolved, negative_prompt=None))([JOB]).pixels
    assert np.abs(steered - plain).max() > 1e-4
    np.testing.assert_allclose(steered[0], steered[1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"height": 72}, "`height` must be a multiple of 16 for this model, got 72"),
        ("pixart", {"width": 72}, "`width` must be a multiple of 16 for this model, got 72"),
        ("flux", {"attention_backend": "eager"}, "must be default, flash, efficient or math for"),
        ("pixart", {"lora": ("a",)}, "`lora` must not be given: PixArtSigmaPipeline cannot load"),
        ("sd3", {"scheduler": "DDIM"}, "`scheduler` must be one of FlowMatch.*, got 'DDIM'"),
        ("flux", {"merging": make_config("tome", keep_rate=0.4)}, "a keep rate of at least 0.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    name: str, changes: dict[str, Any], message: str, saved: Saved, load: Load, tmp_path: Path
) -> None:
    pipe = load(name) if changes.keys() & {"height", "width", "merging"} else None
    changed = options(saved(name), out=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=message):
        generate(changed, pipe=pipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pipeline", "transformer", "message"),
    [
        ("WanPipeline", "wan", "must make images, got a WanTransformer3DModel .* makes videos"),
        ("SanaPipeline", None, "one of these transformers: AuraFlow.* got a SanaTransformer2D"),
        ("FluxImg2ImgPipeline", "flux", "with a UNet, or AuraFlow.*, got FluxImg2ImgPipeline"),
        ("FluxControlPipeline", "flux", "with a UNet, or AuraFlow.*, got FluxControlPipeline"),
    ],
)
def test_other_pipelines_are_refused_before_weights_are_read(
    pipeline: str, transformer: str | None, message: str, tmp_path: Path
) -> None:
    config = {"_class_name": "SanaTransformer2DModel"}
    if transformer is not None:
        model = tiny_transformer(transformer)
        config = {**model.config, "_class_name": type(model).__name__}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    entry = ["diffusers", config["_class_name"]]
    index = {"_class_name": pipeline, "transformer": entry}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_pipeline(options(tmp_path))


def test_the_published_pixart_has_a_transformer_of_an_older_name(tmp_path: Path) -> None:
    PIPELINES["pixart"]().save_pretrained(tmp_path)
    for file in (tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"):
        text = file.read_text()
        assert "PixArtTransformer2DModel" in text
        file.write_text(text.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    pipe = load_pipeline(options(tmp_path))
    assert type(pipe.transformer).__name__ == "PixArtTransformer2DModel"
    assert type(pipe).__name__ in TRANSFORMER_PIPELINES


def test_only_the_transformer_is_compiled(saved: Saved) -> None:
    pipe = load_pipeline(options(saved("flux"), compile=True))
    assert pipe.transformer._compiled_call_impl is not None
    assert pipe.text_encoder_2._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_steps_are_known_in_half_precision(name: str, saved: Saved) -> None:
    """Some pipelines round the timesteps; HunyuanDiT's are integers up to 999."""
    merging = make_config("tome-sd", merge="two-sided", keep_rate=0.5, refresh_every=2)
    changes: dict[str, Any] = {"dtype": "bfloat16", "steps": 3, "merging": merging}
    resolved = resolve_options(options(saved(name), **changes))
    pipe = load_pipeline(resolved)
    with patched(pipe, resolved) as handle:
        pixels = Sampler(pipe, resolved)([JOB]).pixels
    assert np.isfinite(pixels).all()
    calls = 2 if name in ("flux", "lumina2", "qwen_image") else 1
    for row in handle.report().rows:
        assert (row.times_computed, row.times_reused) == (2 * calls, calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auraflow", "flux", "lumina2", "qwen_image", "sd3"])
def test_loras_change_the_picture_by_their_scales(
    name: str, saved: Saved, load: Load, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source = load_pipeline(options(saved(name)))
    torch.manual_seed(0)
    source.transformer.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"])
    )
    layers = get_peft_model_state_dict(source.transformer)
    source.save_lora_weights(str(tmp_path), transformer_lora_layers=layers)

    def picture(*lora: str) -> Any:
        resolved = resolve_options(options(saved(name), lora=lora))
        return Sampler(load_pipeline(resolved), resolved)([JOB]).pixels

    plain = Sampler(load(name), resolve_options(options(saved(name))))([JOB]).pixels
    assert np.abs(picture(str(tmp_path)) - plain).max() > 1e-4
    np.testing.assert_allclose(picture(f"{tmp_path}@0"), plain, atol=1e-5)
