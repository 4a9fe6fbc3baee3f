"""What the benchmark scripts share: CSV rows that name their conditions, documents made of them."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sd_tokenmerge.machine import processor_model

MACHINE_FIELDS = ("device", "threads", "load", "torch", "versions", "commit")
"""The columns of `describe_machine`."""
PACKAGES = ("diffusers", "scikit-learn", "tomesd", "numpy")


def describe_machine(device: str) -> dict[str, str]:
    """What a time depends on besides the code: columns for every row."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES),
        "commit": describe_commit(),
    }


def processor() -> str:
    """The CPU's name and its widest instructions."""
    return f"{processor_model()}, {torch.backends.cpu.get_cpu_capability()}"


def describe_commit() -> str:
    """The commit of the checkout, with `+changes` where the package differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../sd_tokenmerge"], capture_output=True, text=True
    )
    return commit.stdout.strip() + ("+changes" if changed.stdout else "")


def append_rows(path: Path, fields: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Add rows to a CSV file.

    Raises:
        ValueError: the file has other columns, or a row does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        present = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        if present != list(fields):
            raise ValueError(f"{path} has other columns: write to a new file, or remove it.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest of the values, so that few of them are not interpolated."""
    return sorted(values)[round(fraction * (len(values) - 1))]


def write_or_check(document: Path, text: str, *, check: bool) -> int:
    """Write a document, or with `check` say whether it would change; the exit status."""
    if not check:
        document.write_text(text, encoding="utf-8")
    elif text != document.read_text(encoding="utf-8"):
        print(f"{document} differs from its rows: render it anew.", file=sys.stderr)
        return 1
    return 0
