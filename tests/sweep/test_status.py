from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.sampling.run import RunStopped
from sd_tokenmerge.sweep import run as sweep_run
from sd_tokenmerge.sweep.run import run_sweep
from sd_tokenmerge.sweep.status import folder_status

SETTINGS = ["random_keep-0.5", "random_keep-0.7", "tome-sd_keep-0.5", "tome-sd_keep-0.7"]


def test_a_finished_sweep_is_complete(finished, capsys):
    status = folder_status(finished.out)
    assert [Path(one.folder).name for one in status.runs] == [*SETTINGS, "unmerged"]
    assert all(one.is_complete for one in status.runs)
    (sweep,) = status.sweeps
    assert (sweep.settings, sweep.tabulated, sweep.findings) == (5, 5, ())
    assert run(["status", finished.out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{finished.out}: 5 of 5 settings in the tables"
    )


def test_settings_that_were_not_begun_are_missing(make_sweep, monkeypatch, capsys):
    options = make_sweep()
    original, started = sweep_run.generate, []

    def generate(run_options, **kwargs):
        started.append(run_options)
        if len(started) == 3:
            raise RunStopped
        return original(run_options, **kwargs)

    monkeypatch.setattr(sweep_run, "generate", generate)
    with pytest.raises(RunStopped):
        run_sweep(options)
    status = folder_status(options.out)
    assert not status.is_complete
    assert {Path(one.folder).name: (one.done, one.missing, one.state) for one in status.runs} == {
        "unmerged": (2, 0, "complete"),
        "tome-sd_keep-0.7": (2, 0, "complete"),
        **{name: (0, 2, "not begun") for name in SETTINGS if name != "tome-sd_keep-0.7"},
    }
    (sweep,) = status.sweeps
    assert (sweep.settings, sweep.tabulated) == (5, 2)
    assert run(["status", options.out]) == 1
    assert "2 of 5 settings in the tables" in capsys.readouterr().out


def test_damage_is_found(finished):
    folder = Path(finished.out)
    (folder / "table.md").unlink()
    shutil.rmtree(folder / "runs" / "random_keep-0.5")
    (folder / "runs" / "unmerged" / "3_0.png").unlink()
    status = folder_status(folder.parent)
    (sweep,) = status.sweeps
    assert (sweep.settings, sweep.tabulated) == (5, 0)
    runs = {Path(one.folder).name: one for one in status.runs}
    assert (runs["random_keep-0.5"].missing, runs["random_keep-0.5"].state) == (2, "not begun")
    assert (runs["unmerged"].missing, runs["unmerged"].state) == (1, "damaged")
    assert runs["unmerged"].findings == ("1 x recorded image that is not there: 3_0.png",)
    run_sweep(finished)
    assert folder_status(folder).is_complete


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a run \(run\.json\) or a sweep"):
        folder_status(tmp_path)
    with pytest.raises(ValueError, match="must be an existing folder, got 'nowhere'"):
        folder_status("nowhere")


def test_a_damaged_file_does_not_hide_the_others(finished, capsys):
    folder = Path(finished.out)
    (folder / "runs" / "unmerged" / "run.json").write_text("{")
    (folder.parent / "second").mkdir()
    (folder.parent / "second" / "sweep.json").write_text('{"settings": [{"folder": "../x"}]}')
    status = folder_status(folder.parent)
    runs = {Path(one.folder).name: one for one in status.runs}
    assert {name: one.state for name, one in runs.items()} == {
        "unmerged": "damaged",
        **dict.fromkeys(SETTINGS, "complete"),
    }
    assert "run.json is damaged" in runs["unmerged"].findings[0]
    second, sweep = status.sweeps
    assert "sweep.json is damaged" in second.findings[0]
    assert sweep.tabulated == 5
    assert not status.is_complete
    assert run(["status", str(folder.parent)]) == 1
    out, error = capsys.readouterr()
    assert error == ""
    assert "sweep.json is damaged" in out
    assert "tome-sd" in out


@pytest.mark.parametrize("name", ["../victim", "/etc", "..", "", 3])
def test_a_plan_names_no_folder_outside(tmp_path, name):
    setting = {"folder": name, "method": "atc", "keep_rate": 0.5, "images": 2}
    (tmp_path / "sweep.json").write_text(json.dumps({"settings": [setting]}))
    status = folder_status(tmp_path)
    assert status.runs == ()
    assert "sweep.json is damaged" in status.sweeps[0].findings[0]


def test_names_cannot_control_the_terminal(tmp_path, capsys):
    setting = {"folder": "a\x1b[2J", "method": "\x1b[31mred\nline", "keep_rate": 0.5, "images": 2}
    (tmp_path / "sweep.json").write_text(json.dumps({"settings": [setting]}))
    assert run(["status", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "?[31mred?line" in out


def test_findings_name_flags_and_files(finished, capsys):
    file = Path(finished.out) / "runs" / "unmerged" / "run.json"
    file.write_text("junk")
    assert run(["status", finished.out]) == 1
    assert "with --overwrite or in another --out" in capsys.readouterr().out
    assert run(["status", finished.out, "--json"]) == 1
    findings = [one["findings"] for one in json.loads(capsys.readouterr().out)["runs"]]
    assert "with --overwrite or in another --out" in findings[-1][0]
    file.unlink()
    os.mkfifo(file)
    assert run(["status", finished.out]) == 1
    assert f"Not a regular file: `{file}`" in capsys.readouterr().out
    assert run(["status", finished.out, "--json"]) == 1
    assert f"Not a regular file: {file}" in capsys.readouterr().out
