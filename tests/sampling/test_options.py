from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.resolve import resolve_options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "`out` must name a folder"),
        ({"out": "a\udcffb"}, "`out` must be valid Unicode"),
        ({"negative_prompt": "\ud800"}, "`negative_prompt` must be valid Unicode"),
        ({"lora": ("\ud800",)}, "`lora` must be valid Unicode"),
        ({"images_per_class": 0}, r"`images_per_class` must be in \[1, .*got 0"),
        ({"batch_size": 0}, "`batch_size` must be in"),
        ({"steps": 0}, "`steps` must be in"),
        ({"steps": 10**9}, r"`steps` must be in \[1, 10000\), got 1000000000"),
        ({"height": 100}, "`height` must be a multiple of 8, got 100"),
        ({"width": 0}, r"`width` must be in \[8, 16384\), got 0"),
        ({"width": 10**9}, "`width` must be in"),
        ({"images_per_class": 10**12, "seed_scheme": "hashed"}, "`images_per_class` must be in"),
        ({"seed": -1}, "`seed` must be in"),
        ({"class_names": "long"}, "`class_names` must be one of atc, short, got 'long'"),
        ({"seed_scheme": "x"}, "`seed_scheme` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"offload": "disk"}, "`offload` must be one of"),
        ({"attention_backend": "x"}, "`attention_backend` must be one of"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be"),
        ({"prompts": "p.txt", "classes": (1,)}, "`prompts` and `classes` exclude each other"),
        ({"prompt_template": "a"}, "`prompt_template` must contain"),
        ({"classes": ()}, "`classes` must name at least one"),
        ({"classes": (3, 1)}, "`classes` must be ascending and distinct"),
        ({"classes": (1, 1)}, "`classes` must be ascending and distinct"),
        ({"classes": (1, 1000)}, "`class_index` must be in"),
        ({"shard": "0/4"}, "`shard` must be i/n with i from 1 to n, such as 3/16, got '0/4'"),
        ({"shard": "5/4"}, "`shard` must be"),
        ({"shard": "a"}, "`shard` must be"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateOptions(**{"out": "-"} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({"steps": "2"}, {"seed": True}, {"vae": 3}, {"lora": (1,)}, {"classes": (1.0,)}),
        *({"merging": "atc"}, {"images_per_class": float("nan")}, {"compile": "yes"}),
    ],
)
def test_values_of_another_type_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(changes))}` must be"):
        GenerateOptions(out="-", **changes)


def test_shards_are_numbered_from_one() -> None:
    assert GenerateOptions(out="-", shard="3/16").shard_numbers() == (2, 16)
    assert GenerateOptions(out="-").shard_numbers() == (0, 1)


def test_options_survive_json() -> None:
    merging = MergeConfig(keep_rate="0=depth:rate=0.7,1=0.5", merge="kv", seed=3)
    options = GenerateOptions(out="x", classes=(1, 2, 9), lora=("a@0.5",), merging=merging)
    assert GenerateOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    unmerged = GenerateOptions(out="x", merging=None)
    assert GenerateOptions.from_json(json.loads(json.dumps(unmerged.to_json()))) == unmerged


def test_a_missing_option_has_its_default() -> None:
    options = GenerateOptions(out="x", merging=MergeConfig("tome-sd"))
    values = options.to_json()
    del values["offload"], values["lora"], values["merging"]["features"]
    assert GenerateOptions.from_json(values) == options
    del values["merging"]
    assert GenerateOptions.from_json(values) == replace(options, merging=MergeConfig())


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("atc:linkage=average", "atc"), ("tome-sd:random=false,stride=4", "tome-sd:stride=4")],
)
def test_methods_have_one_form(given: str, canonical: str, tmp_path: Path) -> None:
    options = GenerateOptions(out="-", model=str(tmp_path), merging=MergeConfig(given))
    resolved = resolve_options(options)
    assert resolved.merging == MergeConfig(canonical).resolved()
    assert resolve_options(resolved) == resolved


def test_what_makes_the_images_is_compared_and_the_rest_is_not() -> None:
    compared = set(GenerateOptions(out="x").compared())
    merging = {entry.name for entry in fields(MergeConfig)} - {"seed"} | {"merge_seed"}
    assert merging < compared
    everything = {entry.name for entry in fields(GenerateOptions)} - {"merging"}
    assert everything - compared == {
        *("out", "batch_size", "shard", "local_files_only"),  # where and how
        *("model", "model_config", "revision", "vae", "lora", "prompts"),  # by content
        "device",  # by kind
    }


def write_model(folder: Path, **settings: Any) -> str:
    (folder / "sample.json").write_text(json.dumps(settings))
    return str(folder)


def test_without_a_models_own_settings_the_papers_protocol_holds(tmp_path: Path) -> None:
    resolved = resolve_options(GenerateOptions(out="-", model=str(tmp_path), device="cpu"))
    assert (resolved.height, resolved.width, resolved.steps) == (512, 512, 50)
    assert resolved.guidance_scale == 7.5
    assert resolved.classes == tuple(range(1000))
    assert (resolved.merging, resolved.images_per_class) == (MergeConfig("atc", 0.5).resolved(), 2)
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
    )
    resolved = resolve_options(options)
    assert (resolved.height, resolved.width, resolved.steps) == (64, 256, 2)
    assert resolved.guidance_scale == 0
    assert resolved.classes == (1,)
    assert resolved.dtype == "bfloat16"
    assert resolve_options(resolved) == resolved


def test_prompts_come_instead_of_the_models_classes(tmp_path: Path) -> None:
    model = write_model(tmp_path, classes=[9, 3])
    options = GenerateOptions(out="-", model=model, prompts="p.txt", device="cpu")
    assert resolve_options(options).classes is None


def test_the_sample_pipeline_is_the_default_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, checkout = tmp_path / "installed", tmp_path / "checkout"
    monkeypatch.setattr("sd_tokenmerge.sampling.resolve.SAMPLE_PIPELINES", (installed, checkout))
    with pytest.raises(ValueError, match="`model` must be given"):
        resolve_options(GenerateOptions(out="-", device="cpu"))
    for folder, size in ((checkout, 128), (installed, 64)):
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        write_model(folder, size=size)
        resolved = resolve_options(GenerateOptions(out="-", device="cpu"))
        assert (resolved.model, resolved.height) == (str(folder), size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{", r"sample\.json is not valid JSON"),
        ('{"size": "big"}', r"sample\.json is damaged: `height` must be an integer"),
        ('{"steps": 0}', r"sample\.json is damaged: `steps` must be in"),
        ('{"guidance_scale": null, "classes": 3}', r"sample\.json is damaged: "),
        ('{"classes": [1000]}', r"sample\.json is damaged: `class_index` must be in"),
        ('{"classes": [[]]}', r"sample\.json is damaged: "),
    ],
)
def test_a_damaged_sample_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve_options(GenerateOptions(out="-", model=str(tmp_path)))
