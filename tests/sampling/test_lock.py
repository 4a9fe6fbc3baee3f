from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sd_tokenmerge.sampling import lock as lock_module
from sd_tokenmerge.sampling.lock import FolderBusyError, is_locked, lock_folder


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(lock_module, "_SET_UP_TIMEOUT_S", 0.1)
    if request.function is not test_a_look_at_the_lock_stops_nobody:
        monkeypatch.setattr(lock_module, "_PROBE_TIMEOUT_S", 0.0)


def test_a_whole_run_keeps_everyone_out(tmp_path: Path) -> None:
    with lock_folder(tmp_path) as end_set_up:
        end_set_up()
        assert is_locked(tmp_path)
        for other in [(0, 1), (0, 2)]:
            with (
                pytest.raises(FolderBusyError, match="another process"),
                lock_folder(tmp_path, *other),
            ):
                pass
    assert not is_locked(tmp_path)
    with lock_folder(tmp_path):
        pass


def test_shards_of_one_division_work_side_by_side(tmp_path: Path) -> None:
    with lock_folder(tmp_path, 0, 2) as end_set_up:
        end_set_up()
        with lock_folder(tmp_path, 1, 2) as end_second_set_up:
            end_second_set_up()
            assert is_locked(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("other", [(0, 2), (0, 1), (0, 3), (2, 3)])
def test_a_shard_keeps_out_itself_the_whole_and_other_divisions(
    tmp_path: Path, other: tuple[int, int]
) -> None:
    with lock_folder(tmp_path, 0, 2) as end_set_up:
        end_set_up()
        with pytest.raises(FolderBusyError), lock_folder(tmp_path, *other):
            pass
        with lock_folder(tmp_path, 1, 2):  # the failed attempt holds nothing
            pass


def test_a_shard_that_sets_up_makes_others_wait(tmp_path: Path) -> None:
    with lock_folder(tmp_path, 0, 2), pytest.raises(FolderBusyError), lock_folder(tmp_path, 1, 2):
        pass


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from sd_tokenmerge.sampling.lock import lock_folder\n"
        f"with lock_folder(Path({str(tmp_path)!r})): print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(FolderBusyError), lock_folder(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with lock_folder(tmp_path):
        pass


def test_a_look_at_the_lock_stops_nobody(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        pass  # the lock file exists
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            is_locked(tmp_path)

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(40):
            with lock_folder(tmp_path):
                pass
    finally:
        ended.set()
        for watcher in watchers:
            watcher.join()


def test_looking_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_locked(tmp_path)
    with lock_folder(tmp_path, 0, 2) as end_set_up:
        end_set_up()
        names = sorted(os.listdir(tmp_path))
        open_flags = []
        system_open = os.open

        def spy(path: str, flags: int, *arguments: int) -> int:
            open_flags.append(flags)
            return system_open(path, flags, *arguments)

        monkeypatch.setattr(os, "open", spy)
        assert is_locked(tmp_path)
    assert sorted(os.listdir(tmp_path)) == names
    assert open_flags
    assert not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flags in open_flags)
