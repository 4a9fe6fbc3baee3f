"""Options for runs that take a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sd_tokenmerge.config import MergeConfig, make_config
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions

MakeOptions = Callable[..., GenerateOptions]

MERGING = {entry.name for entry in fields(MergeConfig)} - {"seed"}


@pytest.fixture
def make_options(tiny_model: Path, tmp_path: Path) -> MakeOptions:
    """Options for six images of 32 px in two steps, into a new folder.

    Takes fields of `GenerateOptions` and, except for the seed, of `MergeConfig`.
    """

    def make(**changes: Any) -> GenerateOptions:
        values: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "model": str(tiny_model),
            "classes": (0, 1, 2),
            "height": 32,
            "width": 32,
            "steps": 2,
            "method": "tome-sd",
            "device": "cpu",
        }
        values |= changes
        merging = {name: values.pop(name) for name in MERGING & values.keys()}
        config = None if merging["method"] == "none" else make_config(**merging)
        return GenerateOptions(**values, merging=config)

    return make


@pytest.fixture(scope="session")
def tiny_pipe(tiny_model: Path) -> Any:
    """The tiny pipeline, loaded as a run loads it."""
    return load_pipeline(GenerateOptions(out="-", model=str(tiny_model), device="cpu"))
