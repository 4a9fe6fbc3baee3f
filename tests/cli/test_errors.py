"""Errors that users can solve, as they are printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.cli.errors import UserError, user_errors
from tests.fid.pictures import draw
from tests.tiny_models import tiny_sd15

FLAGS = {"keep_rate": "--keep-rate", "out": "--out"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("`keep_rate` must be in (0, 1]."), "--keep-rate must be in (0, 1]."),
        (ValueError("`stride` of tome must be 2."), "`stride` of tome must be 2."),
        (ValueError("'keep_rate' is a file in\n`out`."), "'keep_rate' is a file in --out."),
        (FileNotFoundError(2, "No such file", "out"), "No such file: `out`"),
    ],
)
def test_options_are_named_as_users_type_them(error: Exception, message: str) -> None:
    with pytest.raises(UserError) as caught, user_errors():
        raise error
    caught.value.name_flags(FLAGS)
    assert str(caught.value) == message


def test_a_message_of_the_command_line_stays() -> None:
    error = UserError("`out` is a file.", exit_code=1)
    error.name_flags(FLAGS)
    assert str(error) == "`out` is a file."


def test_each_command_names_its_own_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(0, 0).save("0.png")
    for command, message in {
        "generate --out x --method atk": "--method must be one of",
        "sweep --out x --methods atk": "--methods must be one of",
        "sweep --out x --keep-rates 1.0,1": "--keep-rates must hold each entry once",
        "sites --levels 1 --keep-rate 0=0.5": "--levels must be left out when --keep-rate names",
        "fid . . --extractor vgg": "--extractor must be one of",
        "reference nowhere --out x": "`source` must be an existing folder",  # no flag
    }.items():
        assert run(command.split()) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_to_do_is_said_with_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sd15().save_pretrained(tmp_path / "tiny")
    command = ["generate", "--model", str(tmp_path / "tiny"), "--classes", "1", "--size", "32"]
    command += ["--method", "none", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert run([*command, "--steps", "1"]) == 0
    assert run([*command, "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "error: --out must be a new folder or hold a run with the same options" in error
    assert "steps: 1 -> 2. Choose another folder, or replace the old run with --overwrite." in error
    (tmp_path / "run" / "run.json").write_text("")
    assert run([*command, "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "generate all images again, with --overwrite or in another --out." in error
    assert run([*command, "--steps", "2", "--overwrite"]) == 0


def test_too_little_memory_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("sd_tokenmerge.sampling.run.Sampler.__call__", fail)
    tiny_sd15().save_pretrained(tmp_path / "tiny")
    command = ["--model", str(tmp_path / "tiny"), "--classes", "1", "--size", "32"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    for name in ("generate", "sweep"):
        assert run([name, *command]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: the device has too little memory")
        assert "--batch-size" in error
        shutil.rmtree(tmp_path / "out")


def test_any_terminal_can_show_the_results(tmp_path: Path) -> None:
    tiny_sd15().save_pretrained(tmp_path / "tiny")
    command = ["sweep", "--model", str(tmp_path / "tiny"), "--classes", "1", "--size", "32"]
    command += ["--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--methods", "random", "--keep-rates", "0.5"]
    result = subprocess.run(
        [sys.executable, "-m", "sd_tokenmerge", *command],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert b"### All measurements" in result.stdout
    assert b"| unmerged |" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "abacus"])
def test_a_device_that_is_not_there_is_one_line(
    tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        draw(index, 0).save(tmp_path / f"{index}.png")
    tiny_sd15().save_pretrained(tmp_path / "tiny")
    images, out = str(tmp_path), str(tmp_path / "out")
    for command in (
        ["fid", images, images, "--extractor", "efficientnet-lite0", "--no-cache"],
        ["sweep", "--model", str(tmp_path / "tiny"), "--out", out],
    ):
        assert run([*command, "--device", device]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --device must be")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
