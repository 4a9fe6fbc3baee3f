from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.processes import Processes
from tests.fid.pictures import fill
from tests.fid.toy import toy_extractor

Pair = list[subprocess.Popen[str]]
REPOSITORY = Path(__file__).resolve().parents[2]


def start(module: list[str], rank_arguments: tuple[list[str], list[str]] = ([], [])) -> Pair:
    """Run `python -m MODULE...` as two processes of one group, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *module, *own],
            cwd=REPOSITORY,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(rank_arguments)
    ]


def launch(folder: Path, extractor: str, targets: list[Path]) -> Pair:
    module = ["tests.fid.two_processes", str(folder), extractor]
    return start(module, ([str(targets[0])], [str(targets[1])]))


@pytest.mark.slow
@pytest.mark.parametrize("extractor", ["toy", "efficientnet-lite0"])
@pytest.mark.parametrize("num_images", [13, 12])
def test_two_processes_give_what_one_gives(extractor: str, num_images: int, tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", num_images, 1)
    chosen = toy_extractor() if extractor == "toy" else extractor
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = extract_features(folder, extractor=chosen, cache=False, batch_size=5)
    torch.set_num_threads(threads)
    targets = [tmp_path / "0.pt", tmp_path / "1.pt"]
    processes = launch(folder, extractor, targets)
    errors = [process.communicate(timeout=110)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for target in targets:
        result = torch.load(target)
        assert result["files"] == list(alone.files)
        assert result["from_cache"] == (False, True)
        assert torch.equal(result["features"], alone.features)
        assert torch.equal(result["again"], alone.features)
        assert abs(result["fid"]) < 1e-6


@pytest.mark.slow
def test_more_processes_than_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 1, 1)
    processes = launch(folder, "toy", [tmp_path / "0.pt", tmp_path / "1.pt"])
    errors = [process.communicate(timeout=110)[1] for process in processes]
    assert all("at least 2 images, got 1" in error for error in errors)


@pytest.mark.slow
def test_a_failure_in_one_process_ends_both(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 6, 1)
    (folder / "3_0.png").write_bytes(b"broken")
    processes = launch(folder, "toy", [tmp_path / "0.pt", tmp_path / "1.pt"])
    errors = [process.communicate(timeout=110)[1] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "3_0.png' cannot be read" in errors[1]
    assert "Another process could not extract its images" in errors[0]


@pytest.mark.slow
def test_the_command_prints_once(tmp_path: Path) -> None:
    folders = [fill(tmp_path / name, 3, 2) for name in ("a", "b")]
    arguments = [*folders, "--extractor", "efficientnet-lite0", "--device", "cpu", "--json"]
    processes = start(["sd_tokenmerge", "fid", *map(str, arguments)])
    outputs = [process.communicate(timeout=110) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert abs(json.loads(outputs[0][0])["fid"]) < 1e-6
    assert outputs[1][0] == ""


@pytest.mark.parametrize(("total", "world"), [(10, 3), (9, 3), (2, 3), (1, 1)])
def test_shards_cover_every_image_once(total: int, world: int) -> None:
    shards = [Processes(rank, world).shard(total) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(total))


@pytest.mark.parametrize(("total", "world"), [(10, 3), (9, 3), (2, 3), (7, 2)])
def test_collected_shards_are_in_order(
    total: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(total * 2.0).view(total, 2)
    sent: list[torch.Tensor] = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)  # what the earlier ranks sent, and zeros for those still to come
        missing = [torch.zeros_like(tensor)] * (world - len(sent))
        return torch.cat([*sent, *missing])

    monkeypatch.setattr("accelerate.utils.gather", gather)
    for rank in range(world):
        processes = Processes(rank, world, torch.device("cpu"))
        collected = processes.collect(rows[list(processes.shard(total))], total)
    assert torch.equal(collected, rows)


def test_one_process_joins_no_group() -> None:
    assert Processes.current() == Processes(0, 1, None)
    assert not torch.distributed.is_initialized()
