from __future__ import annotations

import pytest

from sd_tokenmerge.cli.app import run
from sd_tokenmerge.cli.generate import read_options
from sd_tokenmerge.config import PRESETS
from sd_tokenmerge.sampling.options import GenerateOptions

MERGING = ("method", "features", "merge", "refresh_every", "share_layers", "proportional_attention")


@pytest.mark.parametrize("name", PRESETS)
def test_fills_in_what_is_left_open(name: str) -> None:
    options = read_options({"out": "run", "preset": name})
    for option in (*MERGING, "keep_rate"):
        assert getattr(options, option) == getattr(PRESETS[name], option)


def test_without_one_nothing_changes() -> None:
    assert read_options({"out": "run"}) == GenerateOptions(out="run")
    options = read_options({"out": "run", "method": "none", "preset": None})
    assert options == GenerateOptions(out="run", method="none")


def test_other_options_go_before_it() -> None:
    given = {
        "method": "tome-sd",
        "keep_rate": 0.4,
        "features": "input",
        "merge": "qkv",
        "refresh_every": 1,
        "share_layers": False,
        "proportional_attention": False,
    }
    options = read_options({"out": "run", "preset": "fast", **given})
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "slow"], "--preset must be one of exact, balanced, fast, got 'slow'."),
        (["--preset", "fast", "--method", "none"], "--preset excludes --method none, got both."),
    ],
)
def test_bad_ones_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--out", "run", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
