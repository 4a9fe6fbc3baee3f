from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.run import generate
from tests.sampling.ldm_checkpoint import save_single_file


@pytest.fixture(scope="module")
def checkpoint(tiny_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_single_file(tiny_pipe, path)
    return path


def test_a_single_file_loads_what_the_folder_holds(
    checkpoint: Path, tiny_model: Path, tiny_pipe: Any
) -> None:
    pipe = load_pipeline(
        GenerateOptions(out="-", model=str(checkpoint), model_config=str(tiny_model), device="cpu")
    )
    assert type(pipe) is type(tiny_pipe)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(tiny_pipe, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


def test_a_run_can_use_a_single_file(checkpoint: Path, tiny_model: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        **{"classes": (1,), "height": 32, "width": 32, "steps": 2},
        **{"merging": MergeConfig("tome-sd"), "device": "cpu"},
    }
    folder, single = tmp_path / "folder", tmp_path / "single"
    generate(GenerateOptions(out=str(folder), model=str(tiny_model), **common))
    options = GenerateOptions(
        out=str(single), model=str(checkpoint), model_config=str(tiny_model), **common
    )
    assert generate(options).generated == 2
    hashes = [[record.sha256 for record in read_manifest(out)] for out in (folder, single)]
    assert hashes[0] == hashes[1]


def test_without_hub_or_configuration_the_message_says_what_to_give(checkpoint: Path) -> None:
    options = GenerateOptions(out="-", model=str(checkpoint), device="cpu", local_files_only=True)
    with pytest.raises(ValueError, match="give a folder with them as `model_config`"):
        load_pipeline(options)


def test_a_damaged_file_is_refused(checkpoint: Path, tiny_model: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "whole.ckpt")
    cases = {
        "cut.safetensors": checkpoint.read_bytes()[:1000],
        "garbage.ckpt": b"garbage",
        "junk.ckpt": b"junk",
        "empty.ckpt": b"",
        "cut.ckpt": (tmp_path / "whole.ckpt").read_bytes()[:2000],
        "foreign.ckpt": (tmp_path / "whole.ckpt").read_bytes(),
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        options = GenerateOptions(
            out="-", model=str(path), model_config=str(tiny_model), device="cpu"
        )
        with pytest.raises(ValueError, match=r"`model` .* cannot be loaded") as caught:
            load_pipeline(options)
        assert "\n" not in str(caught.value)


VAE_WEIGHT = "first_stage_model.decoder.conv_out.weight"
UNET_WEIGHT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
UNET_BIAS = "model.diffusion_model.output_blocks.2.1.conv.bias"
TEXT_WEIGHT = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (VAE_WEIGHT, lambda value: value.to(torch.int32), "floating point numbers, got I32 for"),
        (VAE_WEIGHT, lambda value: value * torch.nan, "AutoencoderKL must be finite in"),
        (TEXT_WEIGHT, lambda value: None, "do not fit CLIPTextModel: missing"),
        (VAE_WEIGHT, lambda value: None, "do not fit AutoencoderKL: missing"),
        (UNET_WEIGHT, lambda value: None, "do not fit UNet2DConditionModel: missing"),
        (UNET_BIAS, lambda value: None, "do not fit UNet2DConditionModel: missing"),
    ],
    ids=["integers", "infinite", "missing", "missing VAE", "missing UNet", "missing UNet bias"],
)
def test_weights_are_checked_as_those_of_a_folder(
    checkpoint: Path, tiny_model: Path, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    weights = load_file(checkpoint)
    changed = change(weights.pop(name))
    path = tmp_path / "changed.safetensors"
    save_file(weights if changed is None else weights | {name: changed}, path)
    options = GenerateOptions(out="-", model=str(path), model_config=str(tiny_model), device="cpu")
    place = name.split(".")[-2]
    with pytest.raises(ValueError, match=rf"`model` .* loaded: its weights .*{message} .*{place}"):
        load_pipeline(options)


def test_networks_larger_than_the_file_are_not_built(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model_config = Path(shutil.copytree(tiny_model, tmp_path / "config"))
    file = model_config / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 4_000_000}))
    options = GenerateOptions(
        out="-", model=str(checkpoint), model_config=str(model_config), device="cpu"
    )
    with pytest.raises(ValueError, match=r"`model` .* more weights than its files can hold"):
        load_pipeline(options)


def test_a_safety_checker_cannot_come_from_a_single_file(checkpoint: Path) -> None:
    options = GenerateOptions(out="-", model=str(checkpoint), device="cpu", safety_checker=True)
    with pytest.raises(ValueError, match="`safety_checker` must be off"):
        load_pipeline(options)
