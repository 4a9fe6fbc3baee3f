from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from sd_tokenmerge.cli.field_options import flags_of, given_values, with_options
from sd_tokenmerge.options import option


@dataclass(frozen=True)
class Oven:
    name: str = option("Its name.")
    mode: Literal["fan", "grill"] = option("How it heats.", default="fan")
    degrees: float | None = option("Heat.", default=None, when_none="the recipe's")
    light: bool = option("Turn the light on.", default=False)
    racks: tuple[str, ...] = option("Racks; repeatable.", default=())
    minutes: tuple[int, ...] | None = option(
        "Minutes, such as 1,2.",
        default=None,
        parse=lambda text: tuple(int(part) for part in text.split(",")),
    )
    seed: int = option("Its seed.", default=0, flag="--oven-seed")
    serial: int = 3  # not an option


def run(*arguments: str, **only: Any) -> tuple[str, dict[str, Any]]:
    """Output of the command, and the options of `Oven` that reached it."""
    found: dict[str, Any] = {}

    @with_options(Oven, **only)
    def bake(*, size: int = 1, **values: Any) -> None:
        found.update(given_values(Oven, values))

    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(bake)
    return CliRunner().invoke(app, arguments, terminal_width=100).output, found


def test_values_reach_the_command_by_field() -> None:
    assert run("--name", "a") == ("", {"name": "a"})
    given = ["--mode", "grill", "--degrees", "180", "--light", "--racks", "x", "--racks", "y"]
    _, found = run("--name", "a", *given, "--minutes", "3,4", "--oven-seed", "7", "--size", "2")
    assert Oven(**found) == Oven("a", "grill", 180.0, True, ("x", "y"), (3, 4), 7)
    assert run("--name", "a", "--no-light")[1] == {"name": "a", "light": False}
    with pytest.raises(ValueError, match="invalid literal"):
        given_values(Oven, {"minutes": "x"})


def test_help_says_choices_and_defaults() -> None:
    text = " ".join(run("--help")[0].split())
    assert "Its name. [required]" in text
    assert "How it heats. One of fan, grill. Default: fan." in text
    assert "Heat. Default: the recipe's." in text
    assert "Turn the light on. Default: off." in text
    assert "Racks; repeatable." in text
    assert "--serial" not in text


def test_parameters_can_be_chosen() -> None:
    assert "--mode" not in run("--help", only=("name", "oven_seed"))[0]
    assert "--oven-seed" not in run("--help", without=("oven_seed",))[0]
    assert flags_of(Oven)["seed"] == "--oven-seed"
