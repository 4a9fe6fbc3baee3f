from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from sd_tokenmerge.fid.evaluate import compare
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.report.table import rows_from_json
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.run import RunStopped
from sd_tokenmerge.sweep import run as sweep_run
from sd_tokenmerge.sweep.plan import plan_sweep
from sd_tokenmerge.sweep.run import run_sweep

RESULTS = {
    "table.md",
    "table.csv",
    "table.json",
    "table.tex",
    "distance.png",
    "change.png",
    "contact_sheet.jpg",
    "side_by_side.png",
}
SETTINGS = ["unmerged", *(f"{m}_keep-{k}" for m in ("tome-sd", "random") for k in (0.7, 0.5))]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name]
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def changed(before: dict, after: dict) -> set[str]:
    """Files that were written in between."""
    return {name for name in after if before.get(name) != after[name]}


def folder_of(options) -> Path:
    return Path(options.out)


def forbid(monkeypatch, *names: str) -> None:
    """Fail where one of these functions of the sweep is called."""

    def refuse(*args, **kwargs):
        raise AssertionError("this should not have been done again")

    for name in names:
        target = sweep_run.Measurer if name == "measure" else sweep_run
        monkeypatch.setattr(target, name, refuse)


def test_every_number_is_what_a_single_measurement_gives(make_sweep, reference):
    options = make_sweep()
    summary = run_sweep(options)
    folder = folder_of(options)
    assert (summary.num_generated, summary.num_measured, summary.num_written) == (10, 5, 8)
    assert set(summary.files) == RESULTS
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *RESULTS,
        "runs",
        "sweep.json",
    }
    rows, _ = rows_from_json((folder / "table.json").read_text())
    assert rows == summary.results.rows
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(SETTINGS)
    unmerged = folder / "runs" / "unmerged"
    for row, name in zip(rows, SETTINGS, strict=True):
        run = folder / "runs" / name
        single = compare(reference, run, baseline=unmerged, extractor="toy", device="cpu")
        assert row.fid == pytest.approx(single.fid, rel=1e-12)
        assert row.kid == pytest.approx(single.kid, rel=1e-12)
        assert (row.num_generated, row.num_reference) == (2, 16)
        assert row.seconds_per_image == median(r.seconds for r in read_manifest(run))
        if name == "unmerged":
            assert row.delta is row.psnr_db is row.ssim is None
        else:
            images = paired_change(unmerged, run).images
            assert row.delta == pytest.approx(single.delta.fid, rel=1e-9)
            assert row.psnr_db == pytest.approx(median(image.psnr for image in images))
            assert row.ssim == pytest.approx(median(image.ssim for image in images))
            assert row.psnr_db_low <= row.psnr_db <= row.psnr_db_high
            assert row.feature_distance > 0


def test_errors_are_those_of_a_paired_comparison(make_sweep, reference):
    options = make_sweep(
        {"classes": tuple(range(40))}, methods=("random",), keep_rates=(0.3,), sheet_images=2
    )
    _, row = run_sweep(options).results.rows
    runs = folder_of(options) / "runs"
    single = compare(
        reference,
        runs / "random_keep-0.3",
        baseline=runs / "unmerged",
        extractor="toy",
        device="cpu",
    )
    assert row.fid_se == pytest.approx(single.fid_se, rel=1e-9)
    assert row.delta_se == pytest.approx(single.delta.fid_se, rel=1e-9)
    assert row.kid_se == pytest.approx(single.kid_se, rel=1e-9)
    assert 0 < row.delta_se < row.fid_se, "pairs vary less than sets"


def test_a_second_start_does_nothing(finished, monkeypatch):
    options = finished
    before = snapshot(folder_of(options))
    rows, conditions = rows_from_json((folder_of(options) / "table.json").read_text())
    forbid(monkeypatch, "load_pipeline", "measure", "draw_pictures")
    summary = run_sweep(options)
    assert (summary.num_generated, summary.num_measured, summary.num_written) == (0, 0, 0)
    assert (summary.results.rows, summary.results.conditions) == (rows, conditions)
    assert set(summary.files) == RESULTS
    after = snapshot(folder_of(options))
    written = {name for name in changed(before, after) if not name.endswith("manifest.jsonl")}
    assert written == set()
    assert {n: data for n, (_, data) in after.items()} == {
        n: data for n, (_, data) in before.items()
    }


def test_the_pipeline_is_loaded_once(make_sweep, monkeypatch):
    loaded: list[int] = []
    original = sweep_run.load_pipeline
    monkeypatch.setattr(
        sweep_run, "load_pipeline", lambda options: loaded.append(1) or original(options)
    )
    run_sweep(make_sweep(methods=("random",)))
    assert loaded == [1]


def test_a_deleted_image_is_remade_and_nothing_is_measured_again(finished, monkeypatch):
    options = finished
    before = snapshot(folder_of(options))
    image = folder_of(options) / "runs" / "random_keep-0.5" / "18_0.png"
    image.unlink()
    forbid(monkeypatch, "measure")
    summary = run_sweep(options)
    assert (summary.num_generated, summary.num_measured) == (1, 0)
    images = {n for n in changed(before, snapshot(folder_of(options))) if n.startswith("runs/")}
    images = {name for name in images if name.endswith(".png")}
    assert images == {"runs/random_keep-0.5/18_0.png"}
    assert image.read_bytes() == before["runs/random_keep-0.5/18_0.png"][1]


def test_a_damaged_image_is_remade(finished):
    options = finished
    image = folder_of(options) / "runs" / "unmerged" / "3_0.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    assert run_sweep(options).num_generated == 1
    assert image.read_bytes() == whole


def test_a_new_keep_rate_costs_only_itself(finished, make_sweep):
    rows, _ = rows_from_json((folder_of(finished) / "table.json").read_text())
    summary = run_sweep(make_sweep(methods=("random",), keep_rates=(0.7, 0.6)))
    assert (summary.num_generated, summary.num_measured) == (2, 1)
    assert summary.results.rows[:2] == [rows[0], rows[3]]


def test_another_reference_is_measured_but_nothing_is_generated(finished, reference, tmp_path):
    options = finished
    rows, _ = rows_from_json((folder_of(options) / "table.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    same = run_sweep(replace(options, reference=str(other)))
    assert (same.num_generated, same.num_measured) == (0, 0), "the same content elsewhere"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(other / "3.png")
    second = run_sweep(replace(options, reference=str(other)))
    assert (second.num_generated, second.num_measured, second.num_written) == (0, 5, 8)
    assert second.results.rows[0].fid != rows[0].fid


@pytest.mark.parametrize("damage", ["delete", "edit"])
def test_a_damaged_result_is_written_again(finished, damage, monkeypatch):
    options = finished
    table = folder_of(options) / "table.md"
    whole = table.read_bytes()
    table.unlink() if damage == "delete" else table.write_bytes(b"my own notes")
    forbid(monkeypatch, "load_pipeline", "measure")
    run_sweep(options)
    assert table.read_bytes() == whole


def test_an_interrupted_sweep_leaves_a_table_and_goes_on(make_sweep, monkeypatch):
    options = make_sweep()
    original, started = sweep_run.generate, []

    def generate(run, **kwargs):
        started.append(run.out)
        if len(started) == 3:
            raise RunStopped("stopped after the current batch")
        return original(run, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "generate", generate)
        with pytest.raises(RunStopped):
            run_sweep(options)
    table = (folder_of(options) / "table.md").read_text()
    assert "- 2 of 5 settings are done so far." in table
    assert "tome-sd" in table
    assert "random" not in table
    assert not (folder_of(options) / "distance.png").exists()
    summary = run_sweep(options)
    assert (summary.num_generated, summary.num_measured) == (6, 3)
    final = (folder_of(options) / "table.md").read_text()
    assert "so far" not in final
    assert "random" in final
    assert set(summary.files) == RESULTS


def test_results_of_a_larger_sweep_do_not_stay(finished, make_sweep):
    options = finished
    summary = run_sweep(make_sweep(methods=("random",), keep_rates=(1.0,)))
    assert len(summary.results.rows) == 1
    gone = {"distance.png", "change.png", "side_by_side.png"}
    assert set(summary.files) == RESULTS - gone
    assert not any((folder_of(options) / name).exists() for name in gone)


def test_other_options_are_refused_before_anything_is_written(finished, make_sweep):
    options = finished
    before = snapshot(folder_of(options))
    other = make_sweep({"steps": 2})
    with pytest.raises(ValueError, match=r"steps: 1 -> 2"):
        run_sweep(other)
    assert changed(before, snapshot(folder_of(options))) == set()


def test_overwrite_replaces_only_what_differs(finished, make_sweep):
    rows, _ = rows_from_json((folder_of(finished) / "table.json").read_text())
    other = make_sweep({"merge_seed": 7}, methods=("random",), keep_rates=(0.5,))
    summary = run_sweep(other, overwrite=True)
    assert (summary.num_generated, summary.num_measured) == (2, 1), "unmerged stays"
    assert summary.results.rows[0] == rows[0]
    assert summary.results.rows[1].fid != rows[4].fid
    assert summary.results.conditions.settings["merge seed"] == "7"


def test_pictures_that_are_no_part_of_a_run_are_refused(finished):
    options = finished
    runs = folder_of(options) / "runs"
    shutil.copy(runs / "unmerged" / "3_0.png", runs / "random_keep-0.5" / "extra.png")
    with pytest.raises(ValueError, match=r"must be those of its run, got 'extra\.png' besides"):
        run_sweep(options)


def test_without_a_reference_only_the_change_is_measured(make_sweep):
    options = make_sweep(methods=("random",), keep_rates=(0.5,), reference=None)
    summary = run_sweep(options)
    assert set(summary.files) == RESULTS - {"distance.png"}
    unmerged, row = summary.results.rows
    assert row.fid is row.delta is row.extractor is row.feature_distance is None
    assert unmerged.num_generated == row.num_generated == 2
    assert row.psnr_db > 10


def test_a_keep_rate_out_of_reach_is_refused_at_the_start(make_sweep):
    options = make_sweep(methods=("random", "tome"), keep_rates=(0.5, 0.4))
    with pytest.raises(ValueError, match=r"tome, 40 %: .*4x4 grid \(a keep rate of at least 0\.5"):
        run_sweep(options)
    assert not folder_of(options).exists()


def test_a_keep_rate_out_of_reach_can_be_left_out(make_sweep):
    options = make_sweep(methods=("tome",), keep_rates=(0.5, 0.4), skip_unreachable=True)
    results = run_sweep(options).results
    assert [(row.method, row.keep_rate) for row in results.rows] == [("none", 1), ("tome", 0.5)]
    assert results.notes[0].startswith("tome, 40 % is left out: `num_clusters` must be in [8, 16]")


@pytest.mark.parametrize(
    ("generation", "changes", "message"),
    [
        ({"levels": 9}, {}, "`levels` must be in"),
        ({"merge": "q", "proportional_attention": True}, {}, "`proportional_attention` must be"),
        ({"model": "/nowhere/model"}, {}, "`model` must be"),
        ({"seed": 2**63 - 1}, {}, "`base` must leave seeds below"),
        ({}, {"reference": "/nowhere"}, "`reference` must be a folder of images or an .npz file"),
        ({}, {"extractor": "vgg"}, "`extractor` must be one of"),
        ({}, {"protocol": "best"}, "`protocol` must be one of"),
        ({}, {"methods": ("atc:linkage=ward",)}, "linkage must be single"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(make_sweep, generation, changes, message):
    options = make_sweep(generation, **changes)
    with pytest.raises(ValueError, match=message):
        run_sweep(options)
    assert not folder_of(options).exists()


def test_a_model_without_weights_leaves_no_folder(make_sweep, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for file in (model / "unet").glob("*.safetensors"):
        file.unlink()
    options = make_sweep({"model": str(model)})
    with pytest.raises(ValueError, match="cannot be loaded"):
        run_sweep(options)
    assert not folder_of(options).exists()


def test_a_folder_with_something_else_is_refused(make_sweep):
    options = make_sweep()
    folder_of(options).mkdir()
    (folder_of(options) / "thesis.tex").write_text("do not lose this")
    with pytest.raises(ValueError, match=r"hold a sweep .* with 'thesis\.tex' in it"):
        run_sweep(options)


def test_shards_of_every_setting_make_what_one_start_makes(finished, make_sweep, tmp_path):
    options = make_sweep(out=str(tmp_path / "shards"), generation={"images_per_class": 2})
    whole = make_sweep(out=str(tmp_path / "whole"), generation={"images_per_class": 2})
    run_sweep(whole)
    for shard, generated in (("2/3", 5), ("1/3", 5), ("3/3", 10)):
        part = replace(options, generation=replace(options.generation, shard=shard))
        summary = run_sweep(part)
        assert (summary.num_generated, summary.num_measured) == (generated, 0)
        assert summary.results is None
    assert not set(RESULTS) & {path.name for path in folder_of(options).iterdir()}
    summary = run_sweep(options)
    assert (summary.num_generated, summary.num_measured) == (0, 5)
    assert summary.results.rows[3].fid == run_sweep(whole).results.rows[3].fid
    for setting in SETTINGS:
        images = {path.name for path in (folder_of(whole) / "runs" / setting).glob("*.png")}
        assert len(images) == 4
        for name in images:
            first, second = (folder_of(one) / "runs" / setting / name for one in (whole, options))
            assert first.read_bytes() == second.read_bytes()


def test_a_shard_keeps_out_of_a_running_sweep(make_sweep, monkeypatch):
    monkeypatch.setattr(sweep_run, "_SET_UP_TIMEOUT_S", 0)
    options = make_sweep()
    folder_of(options).mkdir()
    part = replace(options, generation=replace(options.generation, shard="1/2"))
    with (
        FileLock(folder_of(options) / ".sweep.lock"),
        pytest.raises(ValueError, match="another sweep is running"),
    ):
        run_sweep(part)


def test_a_second_sweep_in_the_same_folder_is_refused(make_sweep):
    options = make_sweep()
    folder_of(options).mkdir()
    with (
        FileLock(folder_of(options) / ".sweep.lock"),
        pytest.raises(ValueError, match="another sweep is running"),
    ):
        run_sweep(options)


def test_a_damaged_state_is_named(finished):
    options = finished
    state = folder_of(options) / "sweep.json"
    state.write_text(state.read_text()[:50])
    with pytest.raises(ValueError, match=r"sweep\.json is damaged \(no JSON"):
        run_sweep(options)
    state.unlink()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        run_sweep(options)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "damaged (no JSON: Expecting value"),
        (
            '{"format": 1, "plan": []}',
            "damaged (no plan, measurements and results: 'measurements')",
        ),
        ('{"format": 99}', "must be of format 1, and is of another version"),
    ],
)
def test_what_to_do_about_a_damaged_state_helps(finished, content, problem):
    options = finished
    folder = folder_of(options)
    (folder / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        run_sweep(options)
    assert "remove everything in that folder but runs/" in str(caught.value)
    for path in set(folder.iterdir()) - {folder / "runs"}:
        path.unlink()
    summary = run_sweep(options)
    assert (summary.num_generated, summary.num_measured) == (0, 5)


def test_a_damaged_description_of_a_run_is_replaced_on_request(finished):
    options = finished
    description = folder_of(options) / "runs" / "unmerged" / "run.json"
    description.write_text("{")
    with pytest.raises(ValueError, match=r"unmerged/run\.json is damaged"):
        run_sweep(options)
    assert [run.is_replaced for run in plan_sweep(options, overwrite=True).runs] == [
        True,
        *[False] * 4,
    ]
    summary = run_sweep(options, overwrite=True)
    assert summary.num_generated == 2


def test_prompts_of_ones_own(make_sweep, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\na green house\n")
    options = make_sweep(
        {"classes": None, "prompts": str(prompts)}, methods=("random",), keep_rates=(0.5,)
    )
    assert run_sweep(options).num_generated == 4


def test_published_values_are_shown_and_sourced(finished):
    options = replace(finished, published=True)
    assert run_sweep(options).num_measured == 0
    table = (folder_of(options) / "table.md").read_text()
    assert "### FID as published" in table
    assert "ECCV 2024, Table 2" in table
    document = json.loads((folder_of(options) / "table.json").read_text())
    assert len(document["published"]) == 25


def test_the_conditions_say_how_the_images_were_made(finished):
    options = finished
    line = run_sweep(options).results.conditions.line()
    for part in ("N generated 2", "N reference 16", "extractor toy", "protocol atc", "steps 1"):
        assert part in line
    for part in ("size 32x32", "tiny-sd15 (", "dtype float32", "batch 1", "torch 2", "device cpu"):
        assert part in line
    assert str(Path.home()) not in line
