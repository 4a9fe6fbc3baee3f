"""Commands on pipelines of transformers; `tests/sampling` tests what `generate` does with them."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest
from PIL import Image

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.config import PRESETS
from tests.fid.toy import use_toy_extractor
from tests.tiny_pipelines import PIPELINES

SMALL = ["--size", "64", "--steps", "2", "--device", "cpu"]
MERGED = ["--method", "tome-sd", "--keep-rate", "0.5"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a pipeline, and returns its folder."""

    @cache
    def save(name):
        folder = tmp_path_factory.mktemp("models") / name
        PIPELINES[name]().save_pretrained(folder)
        return str(folder)

    return save


def test_sizes_are_refused_by_flag(saved, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--classes", "magpie"]
    command = ["generate", "--model", saved("sd3"), *MERGED, *out]
    assert run([*command, "--height", "64", "--width", "72"]) == 2
    assert "--width must be a multiple of 16 for this model, got 72." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_overlays_show_each_step_once(saved, tmp_path):
    """With guidance, Flux calls its transformer twice per step."""
    command = ["overlay", "--model", saved("flux"), *SMALL, *MERGED, "--classes", "magpie"]
    assert run([*command, "--guidance-scale", "7.5", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "clusters.gif") as animation:
        assert animation.n_frames == 2


def test_sweeps(saved, tmp_path, monkeypatch):
    use_toy_extractor(tmp_path, monkeypatch)
    (tmp_path / "reference").mkdir()
    for number in range(15):
        picture = Image.linear_gradient("L").rotate(24 * number).convert("RGB")
        picture.save(tmp_path / "reference" / f"{number}.png")
    out = tmp_path / "sweep"
    images = [*SMALL, "--classes", "magpie,tench", "--images-per-class", "1"]
    measured = ["--reference", str(tmp_path / "reference"), "--extractor", "toy"]
    settings = ["--methods", "tome-sd", "--keep-rates", "50%", "--out", str(out)]
    assert run(["sweep", "--model", saved("sd3"), *images, *measured, *settings]) == 0
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "tome-sd"]
    assert (out / "index.html").exists()


def test_dry_runs_show_the_defaults_of_the_family_and_read_no_weights(saved, tmp_path, capsys):
    shutil.copytree(saved("pixart"), tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.write_bytes(b"")
    command = ["sweep", "--model", str(tmp_path / "model"), "--methods", "tome-sd", "--dry-run"]
    command += ["--classes", "magpie", "--keep-rates", "50%", "--out", str(tmp_path / "sweep")]
    assert run(command) == 0
    assert "Each image: 128x128 pixels, 20 steps, guidance 4.5." in capsys.readouterr().out
    assert run([*command, "--size", "64", "--steps", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["height"], plan["width"], plan["steps"]) == (64, 64, 3)
    assert plan["guidance_scale"] == 4.5
    assert run(["sites", "--model", str(tmp_path / "model"), *MERGED]) == 0
    assert "64 -> 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "pixart" else pytest.mark.slow)
        for name in sorted(PIPELINES)
    ],
)
def test_benches(name, saved, tmp_path, capsys):
    size = ["--size", "128", "--steps", "2", "--device", "cpu"]  # `fast` takes cells of 5x5 tokens
    command = ["bench", "--model", saved(name), *size, "--out", str(tmp_path), "--quick"]
    assert run([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    presets = {f"preset-{name}" for name in PRESETS}
    assert {*content["pictures"]} == {"full", "steps-1", *presets}  # tomesd patches UNets only
    assert {"unpatched", *presets} < {*content["calls"]}
    assert "tomesd-50" not in content["calls"]
    assert content["calls"]["unpatched"]["relative"] == 1
