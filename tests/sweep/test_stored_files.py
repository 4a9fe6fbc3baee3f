"""Damaged files of a sweep: found by `status`, and written anew by the next start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge.cli.commands import run
from sd_tokenmerge.sweep.folder import SWEEP_FILE, PlannedSetting, count_tabulated, write_plan
from sd_tokenmerge.sweep.run import run_sweep
from sd_tokenmerge.sweep.status import folder_status
from tests.stored_json import JSON, MANY, places, replaced

PLAN = [PlannedSetting("unmerged", "none", 1.0, 2), PlannedSetting("atc", "atc", 0.5, 2)]


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_plan(tmp_path: Path, data: st.DataObject) -> None:
    write_plan(tmp_path, PLAN)
    values = json.loads((tmp_path / SWEEP_FILE).read_text())
    path = data.draw(st.sampled_from(places(values)))
    (tmp_path / SWEEP_FILE).write_text(json.dumps(replaced(values, path, data.draw(JSON))))
    assert run(["status", str(tmp_path)]) == (0 if folder_status(tmp_path).is_complete else 1)
    assert run(["status", "--json", str(tmp_path)]) in (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"keep_rate": "0.5"},
        {"keep_rate": 10**400},
        {"keep_rate": True},
        {"keep_rate": 0},
        {"images": -1},
        {"images": True},
        {"images": 10**30},
        {"method": None},
    ],
)
def test_a_setting_is_checked(tmp_path: Path, change: dict[str, object]) -> None:
    setting = {"folder": "atc", "method": "atc", "keep_rate": 0.5, "images": 2}
    (tmp_path / SWEEP_FILE).write_text(json.dumps({"settings": [setting | change]}))
    status = folder_status(tmp_path)
    assert status.runs == ()
    assert "sweep.json is damaged" in status.sweeps[0].findings[0]


@MANY
@given(table=JSON.map(lambda rows: {"rows": rows}) | JSON)
def test_any_table_is_counted_or_damaged(tmp_path: Path, table: object) -> None:
    for name in ("table.md", "table.csv", "table.tex"):
        (tmp_path / name).write_text("")
    (tmp_path / "table.json").write_text(json.dumps(table))
    rows = table.get("rows") if isinstance(table, dict) else None
    assert count_tabulated(tmp_path) in (0, len(rows) if isinstance(rows, list) else 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["runs/unmerged/manifest.jsonl", "runs/unmerged/run.json"])
def test_a_pipe_in_a_run_ends_in_a_finding(finished, name: str) -> None:
    folder = Path(finished.out)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    broken = [one for one in folder_status(folder).runs if one.folder.endswith("unmerged")]
    assert "Not a regular file" in broken[0].findings[0]
    with pytest.raises(OSError, match="Not a regular file"):
        run_sweep(finished)


def test_names_in_results_cannot_control_a_terminal(finished, tmp_path: Path) -> None:
    for file in Path(finished.out).glob("runs/*/run.json"):
        values = json.loads(file.read_text())
        values["options"]["model"] = "\x1b[31m模型"
        file.write_text(json.dumps(values))
    run_sweep(finished)
    table = (Path(finished.out) / "table.md").read_text()
    assert "\x1b" not in table
    assert "模型" in table
