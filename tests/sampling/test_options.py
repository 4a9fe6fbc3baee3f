from __future__ import annotations

import json
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from sd_tokenmerge.config import PRESETS
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.sampling import options as options_module
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.resolve import resolve_options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 0}, "`images_per_class` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"levels": 0}, "`levels` must be at least 1"),
        ({"refresh_every": 0}, "`refresh_every` must be at least 1"),
        ({"height": 100}, "`height` must be a positive multiple of 8, got 100"),
        ({"width": 0}, "`width` must be a positive multiple of 8, got 0"),
        ({"seed": -1}, "`seed` must be in"),
        ({"merge_seed": 2**63}, "`merge_seed` must be in"),
        ({"class_names": "long"}, "`class_names` must be one of atc, short, got 'long'"),
        ({"seed_scheme": "x"}, "`seed_scheme` must be one of"),
        ({"features": "x"}, "`features` must be one of input, keys"),
        ({"merge": "k"}, "`merge` must be one of qkv, kv, q"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"offload": "disk"}, "`offload` must be one of"),
        ({"attention_backend": "x"}, "`attention_backend` must be one of"),
        ({"keep_rate": 0.0}, r"`keep_rate` must be in \(0, 1\], got 0.0"),
        ({"keep_rate": 1.1}, "`keep_rate` must be in"),
        ({"keep_rate": float("nan")}, "`keep_rate` must be in"),
        ({"keep_rate": "half"}, "`keep_rate` must be a number in .*linear:first=.* got 'half'"),
        ({"keep_rate": "1.5"}, r"`keep_rate` must be in \(0, 1\], got 1.5"),
        ({"keep_rate": "0=0.5,1=0.8", "levels": 2}, "`levels` must be left out where"),
        ({"method": "none", "keep_rate": 0.5}, "`keep_rate` must be 1 without a method"),
        ({"method": "none", "keep_rate": "depth:rate=0.7"}, "must be 1 without a method, got d"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be"),
        ({"prompts": "p.txt", "classes": (1,)}, "`prompts` and `classes` exclude each other"),
        ({"prompt_template": "a"}, "`prompt_template` must contain"),
        ({"classes": ()}, "`classes` must name at least one"),
        ({"classes": (1, 1000)}, "`class_index` must be in"),
        ({"shard": "0/4"}, "`shard` must be i/n with i from 1 to n, such as 3/16, got '0/4'"),
        ({"shard": "5/4"}, "`shard` must be"),
        ({"shard": "a"}, "`shard` must be"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions(out="-", **changes)


def test_shards_are_numbered_from_one() -> None:
    assert GenerateOptions(out="-", shard="3/16").shard_numbers() == (2, 16)
    assert GenerateOptions(out="-").shard_numbers() == (0, 1)


def test_options_survive_json() -> None:
    options = GenerateOptions(out="x", classes=(1, 2, 9), lora=("a@0.5",), keep_rate=0.3)
    assert GenerateOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        (0.5, 0.5),
        (1, 1.0),
        ("0.50", 0.5),
        ("linear:last=0.4,first=1", "linear:first=1,last=0.4,stages=5"),
        ("1=depth:rate=0.70,0=.5", "0=0.5,1=depth:rate=0.7"),
    ],
)
def test_keep_rates_have_one_form(given: Any, canonical: Any, tmp_path: Path) -> None:
    options = GenerateOptions(out="-", model=str(tmp_path), device="cpu", keep_rate=given)
    assert GenerateOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    resolved = resolve_options(options)
    assert resolved.keep_rate == canonical
    assert type(resolved.keep_rate) is type(canonical)
    assert resolve_options(resolved) == resolved


def test_what_makes_the_images_is_compared_and_the_rest_is_not() -> None:
    compared = set(GenerateOptions(out="x").compared())
    everything = {entry.name for entry in fields(GenerateOptions)}
    assert everything - compared == {
        *("out", "batch_size", "shard", "local_files_only"),  # where and how
        *("model", "model_config", "revision", "vae", "lora", "prompts"),  # by content
        "device",  # by kind
    }


def test_defaults_are_those_of_apply_patch() -> None:
    ours = {entry.name: entry.default for entry in fields(GenerateOptions)}
    ours |= {"keep_rate": options_module.DEFAULT_KEEP_RATE}
    papers = asdict(PRESETS["exact"])
    del papers["summary"]
    assert {name: ours[name] for name in papers} == papers
    parameters = signature(apply_patch).parameters
    assert parameters["preset"].default == "exact"
    assert parameters["seed"].default == ours["merge_seed"]
    assert set(parameters) - set(ours) == {"pipe", "preset", "replace"}


def write_model(folder: Path, **settings: Any) -> str:
    (folder / "sample.json").write_text(json.dumps(settings))
    return str(folder)


def test_without_a_models_own_settings_the_papers_protocol_holds(tmp_path: Path) -> None:
    resolved = resolve_options(GenerateOptions(out="-", model=str(tmp_path), device="cpu"))
    assert (resolved.height, resolved.width, resolved.steps) == (512, 512, 50)
    assert resolved.guidance_scale == 7.5
    assert resolved.classes == tuple(range(1000))
    assert (resolved.method, resolved.keep_rate, resolved.images_per_class) == ("atc", 0.5, 2)
    assert resolved.dtype == "float32"
    gpu = resolve_options(GenerateOptions(out="-", model=str(tmp_path), device="cuda"))
    assert gpu.dtype == "float16"


def test_the_models_own_settings_come_before_the_papers(tmp_path: Path) -> None:
    model = write_model(tmp_path, classes=[9, 3], size=256, steps=25, guidance_scale=3.0)
    resolved = resolve_options(GenerateOptions(out="-", model=model, device="cpu"))
    assert (resolved.height, resolved.width, resolved.steps) == (256, 256, 25)
    assert resolved.guidance_scale == 3
    assert resolved.classes == (3, 9)


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    model = write_model(tmp_path, classes=[9, 3], size=256, steps=25, guidance_scale=3.0)
    options = GenerateOptions(
        out="-",
        model=model,
        device="cpu",
        classes=(1,),
        height=64,
        steps=2,
        guidance_scale=0.0,
        dtype="bfloat16",
        keep_rate=1.0,
    )
    resolved = resolve_options(options)
    assert (resolved.height, resolved.width, resolved.steps) == (64, 256, 2)
    assert resolved.guidance_scale == 0
    assert resolved.classes == (1,)
    assert resolved.dtype == "bfloat16"
    assert resolved.keep_rate == 1
    assert resolve_options(resolved) == resolved


def test_prompts_come_instead_of_the_models_classes(tmp_path: Path) -> None:
    model = write_model(tmp_path, classes=[9, 3])
    options = GenerateOptions(out="-", model=model, prompts="p.txt", device="cpu")
    assert resolve_options(options).classes is None


def test_without_a_method_every_token_is_kept(tmp_path: Path) -> None:
    options = GenerateOptions(out="-", model=str(tmp_path), method="none", device="cpu")
    assert resolve_options(options).keep_rate == 1


def test_the_sample_pipeline_is_the_default_model_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_tokenmerge.sampling.resolve.SAMPLE_PIPELINE", tmp_path)
    with pytest.raises(ValueError, match="`model` must be given"):
        resolve_options(GenerateOptions(out="-", device="cpu"))
    (tmp_path / "model_index.json").write_text("{}")
    write_model(tmp_path, size=128)
    resolved = resolve_options(GenerateOptions(out="-", device="cpu"))
    assert (resolved.model, resolved.height) == (str(tmp_path), 128)


def test_a_damaged_sample_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        resolve_options(GenerateOptions(out="-", model=str(tmp_path)))
