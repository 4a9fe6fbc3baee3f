from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.cli.commands import run

SMALL = ["--size", "64", "--steps", "2", "--classes", "magpie"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def test_picture_clusters_and_animation(tiny_model, tmp_path, capsys):
    out = tmp_path / "deep" / "overlay"
    command = ["--model", str(tiny_model), "--method", "tome-sd", *SMALL]
    assert run(["overlay", *command, "--out", str(out)]) == 0
    names = ["picture.png", "clusters.png", "clusters.gif"]
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
    with Image.open(out / "clusters.gif") as animation:
        assert animation.n_frames == 3  # PNDM calls the UNet once more than it has steps

    assert (
        run(["generate", *command, "--images-per-class", "1", "--out", str(tmp_path / "run")]) == 0
    )
    with Image.open(out / "picture.png") as ours, Image.open(tmp_path / "run" / "18_0.png") as same:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(same))

    with Image.open(out / "clusters.png") as sheet:
        everything = sheet.size
    chosen = ["--show-steps", "2", "--show-blocks", BLOCK]
    assert run(["overlay", *command, "--out", str(out), *chosen]) == 0
    with Image.open(out / "clusters.png") as sheet:
        assert sheet.width < everything[0]
        assert sheet.height < everything[1]


def test_a_prompt_instead_of_a_class(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    small = ["--model", str(tiny_model), "--size", "64", "--steps", "1", "--method", "grid"]
    out, other = str(tmp_path / "overlay"), str(tmp_path / "run")
    assert run(["overlay", *small, "--prompt", "a red cube", "--out", out]) == 0
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--images-per-class", "1"]
    assert run(["generate", *small, *prompts, "--out", other]) == 0
    with Image.open(Path(out, "picture.png")) as ours, Image.open(Path(other, "0_0.png")) as same:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(same))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "none"], 2, "--method must merge tokens, got none."),
        (["--prompt", "a"], 2, "--prompt and --classes exclude each other, got both."),
        (["--show-steps", "0"], 2, "--show-steps must be numbers from 1, such as 1,13,25, got '0'"),
        (["--show-steps", "a"], 2, "--show-steps must be numbers from 1, such as 1,13,25, got 'a'"),
        (["--show-steps", "3"], 2, "--show-steps must be in [1, 2], got 3."),
        (["--show-blocks", "a"], 2, f"--show-blocks must be a merged block ({BLOCK}, "),
        (["--keep-rate", "1"], 2, "must have merged tokens in some step"),
        (["--guidance-scale", "1e300"], 1, "1 of 1 images have NaN pixels"),
    ],
)
def test_errors_are_one_line(tiny_model, tmp_path, capsys, arguments, code, message):
    command = ["overlay", "--model", str(tiny_model), "--method", "tome-sd", *SMALL, *arguments]
    if arguments[0] == "--method":
        del command[3:5]
    assert run([*command, "--out", str(tmp_path)]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
