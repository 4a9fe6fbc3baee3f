from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd_tokenmerge.fid.features import extract_features
from tests.fid.pictures import fill
from tests.fid.toy import toy_extractor
from tests.two_processes import Pair, start_two


def launch(folder: Path, extractor: str, targets: list[Path]) -> Pair:
    command = ["-m", "tests.fid.extract_as_one_of_two", str(folder), extractor]
    return start_two(command, ([str(targets[0])], [str(targets[1])]))


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
    assert all("3_0.png' cannot be read" in error for error in errors)


@pytest.mark.slow
def test_the_command_prints_once(tmp_path: Path) -> None:
    folders = [fill(tmp_path / name, 3, 2) for name in ("a", "b")]
    arguments = [*folders, "--extractor", "efficientnet-lite0", "--device", "cpu", "--json"]
    processes = start_two(["-m", "sd_tokenmerge", "fid", *map(str, arguments)])
    outputs = [process.communicate(timeout=110) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert abs(json.loads(outputs[0][0])["fid"]) < 1e-6
    assert outputs[1][0] == ""
