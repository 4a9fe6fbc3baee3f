"""The store of measured rows: CSV files with machine, commit and date in their last columns.

Every file has its own columns for conditions and results, followed by `MACHINE`. Rows are appended
and never changed; tables show the last row of each condition.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from sd_tokenmerge.machine import processor_model

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "docs" / "benchmarks"

MACHINE = ("device", "threads", "load", "torch", "versions", "commit", "date")
PACKAGES = ("diffusers", "tomesd", "DeepCache", "numpy", "scipy", "scikit-learn", "fastcluster")

Row = Mapping[str, object]


def describe_machine(device: str, commit: str | None = None) -> dict[str, str]:
    """The `MACHINE` columns.

    Args:
        device: device of the benchmark: `"cpu"`, `"cuda"`, ...
        commit: the measured commit; default: that of this checkout.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES),
        "commit": commit or describe_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The CPU's model and its widest vector instructions."""
    return f"{processor_model()}, {torch.backends.cpu.get_cpu_capability()}"


def describe_commit() -> str:
    """The commit of this checkout, followed by `+changes` if the package differs from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "sd_tokenmerge"], capture_output=True, text=True
    )
    return commit.stdout.strip() + ("+changes" if changed.stdout else "")


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Append rows to a CSV file; missing values become empty cells.

    Args:
        path: the file; created with its folder if it does not exist.
        columns: all columns of the file.
        rows: by column.

    Raises:
        ValueError: the file or a row has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            present = next(csv.reader(file))
        if present != list(columns):
            raise ValueError(f"{path} must have the columns {list(columns)}, got {present}.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; an empty list if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
