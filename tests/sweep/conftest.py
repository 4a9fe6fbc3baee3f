"""Sweeps with a tiny extractor that take a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.run import run_sweep
from tests.fid.toy import use_toy_extractor

MakeSweep = Callable[..., SweepOptions]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy_extractor(tmp_path, monkeypatch)


def _options(
    out: Path, model: Path, reference: Path, generation: dict[str, Any], changes: dict[str, Any]
) -> SweepOptions:
    images: dict[str, Any] = {
        "out": "-",
        "model": str(model),
        "classes": (3, 18),
        "images_per_class": 1,
        "height": 32,
        "width": 32,
        "steps": 1,
        "device": "cpu",
    }
    values: dict[str, Any] = {
        "out": str(out),
        "methods": ("tome-sd", "random"),
        "keep_rates": (0.7, 0.5),
        "reference": str(reference),
        "features": FeatureOptions(extractor="toy"),
    }
    return SweepOptions(generation=GenerateOptions(**images | generation), **values | changes)


@pytest.fixture
def make_sweep(tiny_model: Path, reference: Path, tmp_path: Path) -> MakeSweep:
    """Options for 2 methods at 2 keep rates, 2 images each of 32 px in one step."""

    def make(generation: dict[str, Any] | None = None, **changes: Any) -> SweepOptions:
        return _options(tmp_path / "sweep", tiny_model, reference, generation or {}, changes)

    return make


@pytest.fixture(scope="session")
def finished_sweep(
    tiny_model: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use_toy_extractor(root, patch)
        run_sweep(_options(root / "sweep", tiny_model, reference, {}, {}))
    return root


@pytest.fixture
def finished(finished_sweep: Path, make_sweep: MakeSweep) -> SweepOptions:
    """A copy of a finished sweep: its options."""
    options = make_sweep()
    shutil.copytree(finished_sweep, Path(options.out).parent, dirs_exist_ok=True)
    return options
