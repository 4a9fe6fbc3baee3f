"""Sweeps in processes of their own: launched together, killed, started twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd_tokenmerge.sampling.manifest import read_manifest

pytestmark = pytest.mark.slow

MODULE = ["-m", "sd_tokenmerge", "sweep"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *MODULE]


def surroundings_with(cache: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SD_TOKENMERGE_CACHE": str(cache)}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing is cached yet."""
    return surroundings_with(tmp_path / "cache")


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, reference: Path) -> list[str]:
    """Two methods at one keep rate, eight images each; 24 images in all."""
    return [
        *("--model", str(tiny_model), "--classes", "0-3", "--images-per-class", "2"),
        *("--size", "32", "--steps", "1", "--device", "cpu", "--methods", "tome-sd random"),
        *("--keep-rates", "50%", "--reference", str(reference)),
        *("--extractor", "efficientnet-lite0"),
    ]


def numbers(folder: Path) -> list[dict]:
    """Everything measured but the times."""
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return [row | {"seconds_per_image": None} for row in rows]


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*_?.png")}


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep."""
    root = tmp_path_factory.mktemp("faults")
    command = [sys.executable, *MODULE, *arguments, "--out", str(root / "whole")]
    environment = surroundings_with(root / "cache")
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return root / "whole"


def test_two_launched_processes_give_what_one_gives(whole, arguments, environment, tmp_path):
    folder = tmp_path / "two"
    command = [*TORCHRUN, *arguments, "--out", str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("### All measurements") == 1, "one process reports"
    assert "24 images generated; results in" in result.stderr
    assert images(folder) == images(whole)
    assert numbers(folder) == numbers(whole)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "0 images generated; results in" in again.stderr


def test_killed_at_any_moment_it_goes_on(whole, arguments, environment, tmp_path, record_property):
    folder = tmp_path / "killed"
    command = [sys.executable, *MODULE, *arguments, "--out", str(folder)]
    delays = random.Random(0)
    kills = 0
    for milestone in ("sweep.json", 1, 3, 8, 9, "table.md", 13, 17, 24, "distance.png"):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while not reached(folder, milestone) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert kills >= 5
    expected = images(whole)
    record_property("kills survived", kills)
    record_property(
        "images lost", sum(images(folder).get(name) != data for name, data in expected.items())
    )
    assert images(folder) == images(whole)
    assert numbers(folder) == numbers(whole)
    left = [path for path in folder.rglob("*") if ".tmp" in path.name or "partial" in path.name]
    assert left == []


def reached(folder: Path, milestone: int | str) -> bool:
    """Whether this number of images, or this file, exists."""
    if isinstance(milestone, str):
        return (folder / milestone).exists()
    return len(list(folder.glob("runs/*/*.png"))) >= milestone


def test_an_interrupt_ends_cleanly_and_says_how_to_go_on(arguments, environment, tmp_path):
    folder = tmp_path / "stopped"
    command = [sys.executable, *MODULE, *arguments, "--steps", "40", "--out", str(folder)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("runs/unmerged/*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Run the same command again" in error
    assert "Traceback" not in error
    done = read_manifest(folder / "runs" / "unmerged")
    assert 0 < len(done) < 8
