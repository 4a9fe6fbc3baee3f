from __future__ import annotations

import pytest

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.cli.generate import read_options
from sd_tokenmerge.config import PRESETS, MergeConfig
from sd_tokenmerge.sampling.options import GenerateOptions


@pytest.mark.parametrize("name", PRESETS)
def test_fills_in_what_is_left_open(name: str) -> None:
    assert read_options({"out": "run", "preset": name}).merging == PRESETS[name]


def test_without_one_nothing_changes() -> None:
    assert read_options({"out": "run"}) == GenerateOptions(out="run")
    options = read_options({"out": "run", "method": "none", "preset": None})
    assert options == GenerateOptions(out="run", merging=None)


def test_other_options_replace_its_values() -> None:
    given = {
        "method": "tome-sd",
        "keep_rate": 0.4,
        "features": "input",
        "merge": "qkv",
        "refresh_every": 1,
        "share_layers": False,
        "proportional_attention": False,
    }
    options = read_options({"out": "run", "preset": "fast", "merge_seed": 3, **given})
    assert options.merging == MergeConfig(**given, seed=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "slow"],
            "--preset must be one of paper, near-lossless, balanced, fast, got 'slow'.",
        ),
        (["--preset", "fast", "--method", "none"], "--method none excludes --preset, got both."),
        (["--levels", "1", "--method", "none"], "--method none excludes --levels, got both."),
        (["--merge-seed", "-1"], "--merge-seed must be in [0, 2^63), got -1."),
        (["--seed", "-1"], "--seed must be in [0, 2^63), got -1."),
    ],
)
def test_bad_ones_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--out", "run", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
