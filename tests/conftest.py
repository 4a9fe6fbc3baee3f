"""What every test shares: no network, no more threads than cores, the same examples every time."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", _cores)))

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Reference material kept beside the repository; absent in most checkouts."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no reference material beside the repository (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.5 in a diffusers folder; copy it to change it."""
    from tests.tiny_models import tiny_sd15

    folder = tmp_path_factory.mktemp("models") / "tiny-sd15"
    tiny_sd15().save_pretrained(folder)
    return folder
