"""Faults for real: killed processes, damaged files, full disks, read-only folders.

All are slow; `make test-faults` runs them and counts kills survived and damages found.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.manifest import MANIFEST, read_manifest
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.status import run_status

slow = pytest.mark.slow
WANTED_KILLS = 20
ROUNDS = 6  # of damages of each kind

COMMAND = [sys.executable, "-m", "sd_tokenmerge"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
ACCELERATE = [*LAUNCH, "--num_machines", "1", "--main_process_port", "0"]
MODULE = ["-m", "sd_tokenmerge"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Bit-identical to the child processes, which get one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(model: Path, out: Path, **changes: Any) -> GenerateOptions:
    values: dict[str, Any] = {
        "model": str(model),
        "classes": tuple(range(12)),
        "height": 64,
        "width": 64,
        "steps": 6,
        "merging": MergeConfig("tome-sd:random=true"),
        "device": "cpu",
        "batch_size": 2,
    }
    return GenerateOptions(out=str(out), **values | changes)


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    """The same as `options`, on the command line."""
    return [
        *("generate", "--model", str(model), "--out", str(out), "--classes", "0-11"),
        *("--size", "64", "--steps", "6", "--method", "tome-sd:random=true"),
        *("--device", "cpu", "--batch-size", "2", *more),
    ]


def content(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that must not depend on interruptions."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("run.json", "manifest.jsonl")
    }
    found["manifest.jsonl"] = [
        asdict(record) | {"seconds": 0, "modified_ns": 0} for record in read_manifest(folder)
    ]
    run = json.loads((folder / "run.json").read_text())
    found["run.json"] = {key: run[key] for key in ("plan", "model", "device", "versions")}
    return found


def wait_for_images(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(folder.glob("*.png"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 24 images."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(options(tiny_model, folder))
    torch.set_num_threads(threads)
    return folder


def lost(folder: Path, whole: Path) -> int:
    """Number of images of the uninterrupted run that are missing or differ."""
    there, wanted = content(folder), content(whole)
    return sum(there.get(name) != wanted[name] for name in wanted if name.endswith(".png"))


def kill_at(folder: Path, images: int, delay: float, child: int) -> bool:
    """Kill a child `delay` after it stored a number of images; returns whether it still ran."""
    while len(list(folder.glob("*.png"))) < images:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_random_moments_a_run_ends_as_if_uninterrupted(
    tiny_model: Path,
    tiny_pipe: Any,
    whole: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    # Forked from a process that has the model: a kill then hits generation, not imports.
    folder = tmp_path / "run"
    wanted = options(tiny_model, folder)
    draw = random.Random(0)
    kills, done, cut_off = 0, 0, 0
    while kills < WANTED_KILLS:
        child = os.fork()
        if child == 0:
            try:
                generate(wanted, pipe=tiny_pipe)
            finally:
                os._exit(0)
        kills += kill_at(folder, done + draw.randint(0, 3), draw.choice([0, 0.002, 0.05]), child)
        if (folder / "run.json").exists():
            status = run_status(folder)
            assert status.done >= done, "images that were there are gone"
            done, cut_off = status.done, cut_off + bool(status.findings)
        if done == 24:  # begin anew until there were enough kills
            generate(wanted, pipe=tiny_pipe)  # it may have been killed while tidying up
            assert content(folder) | {".lock": ""} == content(whole) | {".lock": ""}
            shutil.rmtree(folder)
            done = 0
    generate(wanted, pipe=tiny_pipe)
    record_property("kills survived", kills)
    record_property("found with an image or a line half recorded", cut_off)
    record_property("images lost", lost(folder, whole))
    assert content(folder) == content(whole)
    assert run_status(folder).is_complete


def _cut_off(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _flip_a_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def _replace_by_another(path: Path, draw: random.Random) -> None:
    others = sorted(set(path.parent.glob("*.png")) - {path})
    path.write_bytes(draw.choice(others).read_bytes())


def _edit_a_line(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[draw.randrange(len(lines))] = draw.choice(
        ["", "\n", "garbage\n", '{"file": "0_0.png"}\n']
    )
    path.write_text("".join(lines))


DAMAGES: dict[str, list[Callable[[Path, random.Random], None]]] = {
    "image": [_cut_off, _flip_a_bit, _delete, _replace_by_another],
    "manifest": [_cut_off, _edit_a_line, _delete],
}


@slow
def test_every_damage_is_found_and_repaired(
    tiny_model: Path,
    tiny_pipe: Any,
    whole: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    wanted = options(tiny_model, folder)
    draw = random.Random(0)
    found = 0
    for target, damages in DAMAGES.items():
        for damage in damages * ROUNDS:
            path = folder / f"{draw.randrange(12)}_{draw.randrange(2)}.png"
            damage(path if target == "image" else folder / MANIFEST, draw)
            status = run_status(folder)
            assert status.findings, damage.__name__
            assert not status.is_complete
            assert generate(wanted, pipe=tiny_pipe).findings == status.findings
            assert content(folder) == content(whole), damage.__name__
            found += 1
    record_property("damages found and repaired", found)
    record_property("images lost", lost(folder, whole))


@slow
def test_the_command_survives_kills(
    tiny_model: Path,
    whole: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folder = tmp_path / "run"
    command = [*COMMAND, *arguments(tiny_model, folder)]
    for images in (1, 7, 16):
        process = subprocess.Popen(command, env=ENVIRONMENT, text=True)
        wait_for_images(folder, images, process)
        process.kill()
        process.wait()
    subprocess.run(command, env=ENVIRONMENT, check=True)
    record_property("kills survived", 3)
    record_property("images lost", lost(folder, whole))
    assert content(folder) == content(whole)


@slow
def test_ctrl_c_ends_after_the_batch_and_says_how_to_go_on(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*COMMAND, *arguments(tiny_model, folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
    wait_for_images(folder, 4, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert "Stopping after the current batch" in error
    assert "of 24 images are done. Run the same command again to continue." in error
    assert "Traceback" not in error
    status = run_status(folder)
    assert status.done % 2 == 0
    assert 4 <= status.done < 24
    assert (status.broken, status.findings) == (0, ())
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert content(folder) == content(whole)


@slow
def test_a_second_process_on_the_same_folder_is_refused(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*COMMAND, *arguments(tiny_model, folder)]
    first = subprocess.Popen(command, env=ENVIRONMENT, text=True)
    wait_for_images(folder, 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it is still there when the second one comes
    try:
        second = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True)
        assert run_status(folder).is_running
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "another process is generating" in second.stderr
    assert first.wait() == 0
    assert content(folder) == content(whole)


def in_own_mounts(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount file systems, which vanish with it."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare command to mount file systems with")
    trial = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if trial.returncode:
        pytest.skip("this system does not let us mount file systems")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENVIRONMENT, text=True, capture_output=True
    )


@slow
def test_a_full_disk_stops_the_run_and_breaks_nothing(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join([*COMMAND, *arguments(tiny_model, disk / "run")])
    status = " ".join([*COMMAND, "status", "--json", str(disk / "run")])
    result = in_own_mounts(
        f"mount -t tmpfs -o size=160k tmpfs {disk} || exit 77\n"
        f"{command} > /dev/null; echo $?\n"
        f"{status} | tr -d '\\n'; echo\n"
        f"ls -A {disk}/run | grep -c tmp\n"
        f"mount -o remount,size=10m {disk}\n"
        f"{command} > /dev/null; echo $?\n"
        f"cp -r {disk}/run {tmp_path}/copy\n"
    )
    if result.returncode == 77:
        pytest.skip("this system does not let us mount a tmpfs")
    code, found, temporaries, code_again = result.stdout.splitlines()
    assert code == "1"
    assert "error: No space left on device: `" in result.stderr
    assert "Traceback" not in result.stderr
    state = json.loads(found)["runs"][0]
    assert 0 < state["done"] < 24
    assert state["broken"] <= 2  # stored, but no room for the record
    assert temporaries == "0"
    assert code_again == "0"
    assert content(tmp_path / "copy") == content(whole)


@slow
def test_a_read_only_folder_is_refused_and_shows_its_status(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join([*COMMAND, *arguments(tiny_model, disk / "run")])
    result = in_own_mounts(
        f"mount -t tmpfs tmpfs {disk} && cp -r {whole} {disk}/whole || exit 77\n"
        f"mount -o remount,ro {disk} || exit 77\n"
        f"{' '.join(COMMAND)} status {disk}/whole > /dev/null || exit 78\n{command}"
    )
    if result.returncode == 77:
        pytest.skip("this system does not let us mount a tmpfs")
    assert result.returncode == 2  # and the status needed no permission to write
    assert result.stderr == f"error: Permission denied: `{disk}`\n"


@slow
@pytest.mark.parametrize("launch", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_two_launched_processes_share_the_work(
    tiny_model: Path, whole: Path, tmp_path: Path, launch: list[str]
) -> None:
    folder = tmp_path / "run"
    command = [*launch, *MODULE, *arguments(tiny_model, folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)
    shares: set[str] = set()
    while process.poll() is None:
        shares |= {path.name for path in folder.glob("manifest*")}
        time.sleep(0.01)
    assert process.returncode == 0
    assert shares == {"manifest.jsonl", "manifest.process-1.jsonl"}
    assert process.communicate()[0].count("24 generated") == 1  # one summary, for both
    assert content(folder) == content(whole)


@slow
def test_two_machines_share_the_work(tiny_model: Path, whole: Path, tmp_path: Path) -> None:
    # Two launchers that know each other only by an address, with the folder in common.
    folder = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ["--main_process_ip", "127.0.0.1", "--main_process_port"]
        address.append(str(probe.getsockname()[1]))
    machines = [
        subprocess.Popen(
            [
                *(*LAUNCH, "--num_machines", "2", "--machine_rank", str(rank), *address),
                *(*MODULE, *arguments(tiny_model, folder)),
            ],
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    shares: set[str] = set()
    while any(machine.poll() is None for machine in machines):
        shares |= {path.name for path in folder.glob("manifest*")}
        time.sleep(0.01)
    outputs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert shares == {"manifest.jsonl", "manifest.process-1.jsonl"}
    assert [output.count("24 generated") for output in outputs] == [1, 0]
    assert content(folder) == content(whole)


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_of_two_loses_nothing(
    tiny_model: Path,
    whole: Path,
    tmp_path: Path,
    victim: int,
    record_property: Callable[[str, object], None],
) -> None:
    psutil = pytest.importorskip("psutil")
    folder = tmp_path / "run"
    command = [*TORCHRUN, *MODULE, *arguments(tiny_model, folder)]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_images(folder, 4, launcher)
    workers = {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    workers[victim].kill()
    launcher.communicate()
    assert launcher.returncode != 0
    status = run_status(folder)
    assert not status.is_running
    assert 0 < status.done < 24
    assert subprocess.run(command, env=ENVIRONMENT).returncode == 0
    record_property("kills survived", 1)
    record_property("images lost", lost(folder, whole))
    assert content(folder) == content(whole)


@slow
def test_ctrl_c_ends_both_processes_after_their_batch(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*TORCHRUN, *MODULE, *arguments(tiny_model, folder)]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_images(folder, 4, launcher)
    launcher.send_signal(signal.SIGINT)
    error = launcher.communicate()[1]
    assert launcher.returncode != 0
    assert error.count("Run the same command again to continue.") == 1
    status = run_status(folder)
    assert 4 <= status.done < 24
    assert (status.broken, status.findings) == (0, ())
    assert subprocess.run(command, env=ENVIRONMENT).returncode == 0
    assert content(folder) == content(whole)
