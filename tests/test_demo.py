"""The demonstration, with a tiny pipeline in place of the sample pipeline."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge import PRESETS
from sd_tokenmerge.cli.commands import run

NAMES = ["unmerged", *PRESETS, "unmerged, 4 steps", "unmerged, 3 steps"]
FOLDERS = ["unmerged", *PRESETS, "4-steps", "3-steps"]


@pytest.fixture(scope="module")
def sample(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "pipeline"
    shutil.copytree(tiny_model, folder)
    settings = {"classes": [1, 5, 18, 20, 25], "size": 64, "steps": 5, "guidance_scale": 3.0}
    (folder / "sample.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def pipelines(sample, monkeypatch):
    monkeypatch.setattr("sd_tokenmerge.sampling.resolve.SAMPLE_PIPELINES", (sample,))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture, np.float64)


@pytest.mark.slow
def test_pictures_table_and_clusters(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    assert run(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.partition("  ")[0] for line in lines[1 : 1 + len(NAMES)]] == NAMES
    cells = [line.split() for line in lines[1 : 1 + len(NAMES)]]
    assert [row[-3] for row in cells] == ["5"] * (1 + len(PRESETS)) + ["4", "3"]
    for row, folder in zip(cells[1:], FOLDERS[1:], strict=True):
        ratios = []
        for name in ("1_0.png", "18_0.png", "25_0.png"):
            error = (pixels(out / folder / name) - pixels(out / "unmerged" / name)) ** 2
            ratios.append(10 * np.log10(255**2 / error.mean()))
        assert float(row[-2]) == pytest.approx(np.mean(ratios), abs=0.06)
    assert "| fast | 0.1 | 5 |" in (out / "table.md").read_text()

    drawn = [f"clusters_{name}.{kind}" for name in PRESETS for kind in ("png", "gif")]
    files = [str(out / name) for name in ("contact_sheet.png", "table.md", *drawn)]
    assert lines[-len(files) :] == files
    with Image.open(out / "clusters_fast.gif") as animation:
        assert animation.n_frames == 6

    monkeypatch.setattr("sd_tokenmerge.sampling.run.Sampler", None)  # nothing is generated again
    assert run(["demo", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_a_folder_with_other_runs(tmp_path, capsys):
    out = tmp_path / "demo"
    other = ["--method", "none", "--classes", "1", "--images-per-class", "1", "--steps", "1"]
    assert run(["generate", *other, "--out", str(out / "unmerged")]) == 0
    capsys.readouterr()
    assert run(["demo", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("display", "is_terminal", "opened"), [(":0", True, 1), ("", True, 0), (":0", False, 0)]
)
def test_the_sheet_is_opened_on_a_display(tmp_path, monkeypatch, display, is_terminal, opened):
    calls = []
    result = type("Result", (), {"rows": [], "files": [tmp_path / "sheet.png"]})
    monkeypatch.setattr("sd_tokenmerge.demo.run_demo", lambda *args, **options: result)
    monkeypatch.setattr("typer.launch", calls.append)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert run(["demo", "--out", str(tmp_path)]) == 0
    assert run(["demo", "--out", str(tmp_path), "--no-open"]) == 0
    assert calls == [str(tmp_path / "sheet.png")] * opened
