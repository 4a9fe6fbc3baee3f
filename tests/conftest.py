"""What every test shares: no network, no more threads than cores, the same examples every time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", _cores)))

FAULT_COUNTS = ("kills survived", "damages found and repaired", "images lost")
"""Counts that fault tests record; their sums are printed at the end of a run."""

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


def count_faults(reports: Iterable[Any]) -> str | None:
    """The sum of what the finished fault tests recorded; None without any."""
    counts: Counter[str] = Counter()
    for report in reports:
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                if name in FAULT_COUNTS:
                    counts[name] += int(value)
    if not counts:
        return None
    return "faults: " + ", ".join(f"{counts[name]} {name}" for name in FAULT_COUNTS)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts of the fault tests that have just run, failed ones included."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    if (line := count_faults(reports)) is not None:
        terminalreporter.write_line(line)
