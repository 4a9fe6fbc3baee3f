from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.fid.evaluate import compare
from tests.fid.pictures import blur, draw
from tests.fid.toy import use_toy_extractor
from tests.tiny_models import tiny_sd15

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy_extractor(tmp_path, monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("SD_TOKENMERGE_INCEPTION", raising=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    kinds = {"reference": 0, "unmerged": 0, "merged": 1}
    for name, strength in kinds.items():
        (root / name).mkdir()
        for index in range(48):
            seed = index + 100 if name == "reference" else index
            picture = draw(seed % 24, seed)
            picture = blur(picture, strength) if strength else picture
            picture.resize((48, 48)).save(root / name / f"{index % 24}_{index // 24}.png")
    return {name: root / name for name in kinds}


def fid(*arguments: object) -> int:
    return run(["fid", *(str(argument) for argument in arguments)])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one-line error for bad input."""
    assert fid(*arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    return line


def test_json_is_the_comparison(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = folders["reference"], folders["merged"]
    assert fid(*pair, "--extractor", "toy", "--json", "--manifold") == 0
    values = json.loads(capsys.readouterr().out)
    expected = compare(*pair, extractor="toy", manifold=True).to_dict()
    for name in set(expected) - {"seconds", "warnings", "manifold"}:
        assert values[name] == expected[name], name
    assert set(values["manifold"]) == {"precision", "recall", "density", "coverage"}


def test_text_names_everything_that_matters(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = fid(
        folders["reference"], folders["merged"], "--baseline", folders["unmerged"],
        "--extractor", "toy", "--protocol", "torchmetrics", "--manifold",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0
    lines = dict(line.split("  ", 1) for line in output.splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["images"] == "48 reference, 48 generated"
    assert values["features"] == "12 of toy, weights 00000000"
    assert values["protocol"] == "torchmetrics, float32"
    assert values["standard errors"] == "jackknife, 20 groups of images"
    assert "±" in values["FD"]
    assert values["FD - baseline"].startswith(("+", "-"))
    assert "2 SE" in values["FD - baseline"]
    assert values["PSNR to baseline"].endswith("dB, mean (0 identical)")
    assert values["SSIM to baseline"].endswith(", mean")
    assert float(values["features to baseline"].removesuffix(", mean")) > 0
    assert "precision, recall" in values


def test_few_images_have_no_error_and_that_is_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for picture in sorted(folders["merged"].iterdir())[:39]:
        shutil.copy(picture, few)
    for folder, is_said in ((few, True), (folders["merged"], False)):
        assert fid(folders["reference"], folder, "--extractor", "toy") == 0
        output = capsys.readouterr().out
        assert ("standard errors  none with fewer than 40 images" in output) is is_said
        assert ("±" in output) is not is_said


def test_several_runs_are_not_one_set(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(folders["merged"], tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    line = failure(capsys, folders["reference"], tmp_path / "runs", "--extractor", "toy")
    assert "`generated` must be one set of images, got" in line
    assert line.endswith(f"such as {str(tmp_path / 'runs' / 'a')!r}.")
    assert fid(folders["reference"], tmp_path / "runs" / "a", "--extractor", "toy") == 0


def test_an_unfinished_run_is_noted(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_sd15().save_pretrained(tmp_path / "tiny")
    out = tmp_path / "run"
    command = ["generate", "--model", str(tmp_path / "tiny"), "--classes", "3", "--size", "32"]
    assert run([*command, "--steps", "1", "--device", "cpu", "--out", str(out)]) == 0
    assert fid(folders["reference"], out, "--extractor", "toy") == 0
    assert "not complete" not in capsys.readouterr().err
    (out / "3_1.png").rename(out / "other.png")
    note = (
        "generated: the run is not complete: 1 of 2 images are done; "
        "1 x recorded image that is not there: 3_1.png; "
        "1 x picture that is not part of the run: other.png."
    )
    assert fid(folders["reference"], out, "--extractor", "toy") == 0
    assert f"note: {note}\n" in capsys.readouterr().err
    assert fid(folders["reference"], out, "--extractor", "toy", "--json") == 0
    assert note in json.loads(capsys.readouterr().out)["warnings"]


def test_statistics_can_be_saved_and_used(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "reference.npz"
    assert fid(folders["reference"], "--save-statistics", saved, "--extractor", "toy") == 0
    assert "48 images, toy (weights 00000000), protocol atc, float32" in capsys.readouterr().out
    for reference in (saved, folders["reference"]):
        assert fid(reference, folders["merged"], "--extractor", "toy", "--json") == 0
    output = capsys.readouterr().out
    first, second = json.loads("[" + output.replace("}\n{", "},{") + "]")
    assert first["fid"] == second["fid"]
    assert first["fid_se"] == second["fid_se"]


def test_foreign_statistics_need_a_protocol(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(12), sigma=np.eye(12))
    pair = tmp_path / "foreign.npz", folders["merged"]
    line = failure(capsys, *pair, "--extractor", "toy")
    assert "--assume-protocol" in line
    assert fid(*pair, "--extractor", "toy", "--assume-protocol", "atc") == 0
    output, notes = capsys.readouterr()
    assert "unknown reference, 48 generated" in output
    assert "extractor and protocol are assumed" in notes


def test_bad_input_is_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = folders["reference"]
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for index in range(3):
        draw(index, 0).save(broken / f"{index}.png")
    (broken / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    toy = ("--extractor", "toy")
    assert "'/missing'" in failure(capsys, good, "/missing", *toy)
    assert "found none" in failure(capsys, good, tmp_path / "empty", *toy)
    assert "1.png' cannot be read" in failure(capsys, good, broken, *toy)
    assert "pt_inception-2015-12-05" in failure(capsys, good, good)
    assert "`generated` must be a folder of images or" in failure(capsys, good, "/missing")
    assert "`reference` must be a folder of images or" in failure(capsys, "", good)
    assert "`generated` must hold images" in failure(capsys, good, tmp_path / "empty")
    assert "--baseline must be a folder of" in failure(capsys, good, good, "--baseline", "/missing")
    assert "--extractor must be one of" in failure(capsys, good, good, "--extractor", "vgg")
    assert "--protocol must be one of" in failure(capsys, good, good, *toy, "--protocol", "x")
    assert "--precision must be" in failure(capsys, good, good, *toy, "--precision", "int8")
    for device in ("gpu", "meta"):
        message = f"--device must be .* got '{device}'"
        assert re.search(message, failure(capsys, good, good, *toy, "--device", device))
    size = ("--kid-subset-size", 1000)
    assert "--kid-subset-size must be in [2, 48]" in failure(capsys, good, good, *toy, *size)
    assert "--save-statistics" in failure(capsys, good, *toy)
    assert "--no-cache" in failure(capsys, good, good, *toy, "--no-cache", "--cache", tmp_path)
    assert "must end in .npz" in failure(capsys, good, *toy, "--save-statistics", tmp_path / "x")
    assert "does not exist" in failure(capsys, good, tmp_path / "x.npz", *toy)
    assert "same file names" not in failure(capsys, good, good, *toy, "--baseline", broken)


def test_a_baseline_of_other_size_needs_force(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for path in sorted(folders["unmerged"].iterdir())[:40]:
        (small / path.name).write_bytes(path.read_bytes())
    arguments = (folders["reference"], folders["merged"], "--baseline", small, "--extractor", "toy")
    assert "--force" in failure(capsys, *arguments)
    assert fid(*arguments, "--force") == 0
    assert "the difference is biased" in capsys.readouterr().err


def test_importing_the_command_imports_no_torch() -> None:
    program = "import sys, sd_tokenmerge.cli.fid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_a_full_disk_is_one_line(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file = tmp_path / "set.npz"
    toy = ("--extractor", "toy", "--no-cache")
    line = failure(capsys, folders["reference"], "--save-statistics", file, *toy)
    assert line == f"error: No space left on device: `{file}`"
    assert not list(tmp_path.glob("*set.npz*"))
