from __future__ import annotations

import json

import pytest
from PIL import Image

from sd_tokenmerge.bench import run as bench
from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.config import PRESETS
from tests.report.html_document import parse


@pytest.fixture
def command(tiny_model, tmp_path):
    size = ["--size", "64", "--steps", "2", "--device", "cpu"]
    return ["bench", "--model", str(tiny_model), *size, "--out", str(tmp_path / "b"), "--quick"]


def test_interrupted_resumed_done_and_repaired(command, tmp_path, capsys, monkeypatch):
    generate, started = bench.Recipe.generate, []

    def interrupted(recipe, *arguments):
        started.append(recipe.name)
        if recipe.name == "preset-fast":
            raise KeyboardInterrupt
        return generate(recipe, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bench.Recipe, "generate", interrupted)
        assert run(command) == 130
    assert "interrupted. Run the same command again to continue." in capsys.readouterr().err
    assert "preset-paper" in started
    before = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert "verdict" not in before
    kept = (tmp_path / "b" / "pictures" / "full" / "manifest.jsonl").read_text()

    assert run([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rounds"] == before["rounds"]  # not timed again
    assert (tmp_path / "b" / "pictures" / "full" / "manifest.jsonl").read_text() == kept
    names = {"full", "steps-1", "tomesd-50", *(f"preset-{name}" for name in PRESETS)}
    assert {*content["pictures"]} == names
    assert {"unpatched", "oracle-qkv-50", "tomesd-50"} < {*content["calls"]}
    assert content["calls"]["unpatched"]["relative"] == 1
    assert all(
        len(row["psnr_db"]) == 1 for name, row in content["pictures"].items() if name != "full"
    )
    assert len(content["verdict"]) == 2
    for name in ("plot.png", "contact_sheet.jpg"):
        with Image.open(tmp_path / "b" / name) as image:
            assert image.width > 300

    page = tmp_path / "b" / "index.html"
    document = parse(page.read_bytes())
    assert len(document.attributes("img", "src")) == 2
    assert {*content["verdict"]} < {*document.texts("p")}
    assert {*content["calls"], *content["pictures"]} < {*document.texts("th")}
    assert {content["conditions"]["device"], *content["conditions"]["versions"].values()} < {
        *document.texts("dd")
    }
    written = page.read_bytes()
    page.unlink()

    def fail(*_):
        raise AssertionError("nothing is left to load")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "load_pipeline", fail)
        assert run(command) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["call", "ms", "of", "unpatched"]
    assert out.endswith("\n\n".join(content["verdict"]) + "\n")
    assert page.read_bytes() == written

    picture = next((tmp_path / "b" / "pictures" / "preset-fast").glob("*.png"))
    intact = picture.read_bytes()
    picture.write_bytes(intact[:-1])
    assert run(command) == 0
    assert picture.read_bytes() == intact

    picture.unlink()
    description = picture.with_name("run.json")
    content = description.read_bytes()
    description.write_bytes(b"{")
    assert run(command) == 2
    error = capsys.readouterr().err
    assert f"Remove the folder {picture.parent}, or use another --out.\n" in error
    assert "overwrite" not in error
    description.write_bytes(content)
    assert run(command) == 0
    assert picture.read_bytes() == intact
    capsys.readouterr()

    assert run([*command, "--guidance-scale", "2"]) == 2
    assert "with another guidance_scale: 7.5, now 2.0." in capsys.readouterr().err
    assert run([*command, "--seed", "1"]) == 2
    assert "with another seed: 0, now 1. Use another --out." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"conditions": 1, "rounds": []}'])
def test_a_damaged_record_is_refused(text, command, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bench.json").write_text(text)
    assert run(command) == 2
    assert "bench.json is damaged: remove it, or use another --out." in capsys.readouterr().err


def test_unsound_patches_are_not_timed(command, tmp_path, capsys, monkeypatch):
    broken = bench.preset_contestants()[0].__class__("idle")
    monkeypatch.setattr(bench, "preset_contestants", lambda: [broken])
    assert run(command) == 1
    assert "error: idle: merging did nothing. Nothing was timed." in capsys.readouterr().err
    assert not (tmp_path / "b" / "bench.json").exists()
