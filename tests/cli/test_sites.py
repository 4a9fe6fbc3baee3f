from __future__ import annotations

import json

import pytest
import torch

from sd_tokenmerge.cli.commands import run
from tests.sampling.ldm_checkpoint import save_single_file
from tests.tiny_models import tiny_sd15


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd15().save_pretrained(folder)
    return str(folder)


def test_sd15_merges_5_of_16_blocks(shared, capsys):
    model = str(shared / "model-configs" / "stable-diffusion-v1-5")
    assert run(["sites", "--model", model]) == 0
    first, blank, *table = capsys.readouterr().out.splitlines()
    assert first == (
        "5 of 16 self-attentions are merged by atc at keep rate 0.5: 4,096 -> 2,048 tokens."
    )
    assert blank == ""
    assert table[0].split() == ["block", "level", "grid", "tokens", "after"]
    assert table[1].split() == [
        "down_blocks.0.attentions.0.transformer_blocks.0",
        *("0", "64x64", "4,096", "2,048"),
    ]
    assert sum(line.endswith(" -") for line in table) == 11
    assert len(table) == 17


@pytest.mark.parametrize("model", ["stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"])
def test_tables_fit_a_terminal_up_to_2048_pixels(model, shared, capsys):
    folder = shared / "model-configs" / model
    assert run(["sites", "--model", str(folder), "--size", "2048", "--keep-rate", "0.9"]) == 0
    _, _, *table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80


def test_options_and_json(model, capsys):
    options = ["--method", "tome-sd", "--keep-rate", "0.7", "--levels", "2"]
    command = ["sites", "--model", model, *options, "--height", "64", "--width", "96", "--json"]
    assert run(command) == 0
    sites = json.loads(capsys.readouterr().out)
    assert len(sites) == 16
    merged = [site for site in sites if site["merged"]]
    assert len(merged) == 10
    assert merged[0] == {
        "block": "down_blocks.0.attentions.0.transformer_blocks.0",
        "level": 0,
        "heads": 8,
        "channels": 32,
        "grid": {"height": 8, "width": 12},
        "tokens_before": 96,
        "tokens_after": 68,
        "merged": True,
    }


def test_keep_rates_by_level_and_block(model, capsys):
    command = ["sites", "--model", model, "--keep-rate", "0=depth:rate=0.7,2=0.5"]
    assert run(command) == 0
    first, _, *table = capsys.readouterr().out.splitlines()
    assert first == (
        "10 of 16 self-attentions are merged by atc at keep rate 0=depth:rate=0.7,2=0.5: "
        "256 -> 103 tokens, 256 -> 141 tokens, 16 -> 8 tokens, 256 -> 180 tokens, "
        "256 -> 218 tokens, 256 -> 256 tokens."
    )
    assert len(table) == 17


def test_the_size_a_sample_was_made_for_is_its_default(model, tmp_path, capsys):
    import shutil

    shutil.copytree(model, tmp_path / "sample")
    (tmp_path / "sample" / "sample.json").write_text('{"size": 64}')
    assert run(["sites", "--model", str(tmp_path / "sample")]) == 0
    assert "64 -> 32 tokens" in capsys.readouterr().out


def test_single_file_checkpoints(model, tmp_path, capsys):
    checkpoint = tmp_path / "tiny.safetensors"
    save_single_file(tiny_sd15(), checkpoint)
    assert run(["sites", "--model", model]) == 0
    table = capsys.readouterr().out
    assert run(["sites", "--model", str(checkpoint), "--model-config", model]) == 0
    assert capsys.readouterr().out == table
    assert run(["sites", "--model", str(checkpoint), "--local-files-only"]) == 2
    error = capsys.readouterr().err
    assert "Offline, give a folder with them as --model-config." in error
    (tmp_path / "text.safetensors").write_text("text")
    assert run(["sites", "--model", str(tmp_path / "text.safetensors")]) == 2
    assert "text.safetensors' cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_configurations_of_a_checkpoint_come_from_the_model_it_was_made_from(
    kind, published, shared, tmp_path, monkeypatch, capsys
):
    from safetensors.torch import save_file

    names = ["model.diffusion_model.input_blocks.0.0.weight"]
    if "xl" in kind:
        names += [
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        ]
    checkpoint = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(4, 4, 1, 1) for name in names}, checkpoint)
    asked = []

    def download(model, file, **_):
        asked.append(model)
        return str(shared / "model-configs" / kind / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert run(["sites", "--model", str(checkpoint)]) == 0
    assert "self-attentions are merged" in capsys.readouterr().out
    assert set(asked) == {published}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-rate", "0"], "--keep-rate must be in (0, 1], got 0.0"),
        (["--keep-rate", "0.4", "--method", "tome"], "a keep rate of at least 0.5"),
        (["--method", "atc:linkage=ward"], "linkage must be single|complete|average"),
        (["--keep-rate", "half"], "--keep-rate must be a number in (0, 1], linear:"),
        (["--keep-rate", "linear:first=1,last=0.5"], "must be the same in every step, got linear"),
        (
            ["--keep-rate", "0=0.5", "--levels", "1"],
            "--levels must be left out when --keep-rate names them",
        ),
        (["--size", "100"], "--size must be a positive multiple of 8, got 100"),
        (["--width", "100"], "--width must be a positive multiple of 8, got 100"),
        (["--size", "64", "--width", "64"], "--size excludes --height and --width"),
        (["--levels", "0"], "--levels must be at least 1"),
        (["--model", "/nowhere/at/all"], "--model must be a diffusers folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, options, message, capsys):
    assert run(["sites", "--model", model, *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
