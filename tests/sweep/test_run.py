from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.fid.evaluate import compare
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.report.rows import SweepRow, conditions_sentence
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.run import RunStopped
from sd_tokenmerge.sweep import run as sweep_run
from sd_tokenmerge.sweep.folder import RESULT_FILES
from sd_tokenmerge.sweep.plan import plan_sweep
from sd_tokenmerge.sweep.run import run_sweep

RESULTS = set(RESULT_FILES)
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


def read_rows(folder: Path) -> list[SweepRow]:
    """The measured rows of `table.json`."""
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return [
        SweepRow(
            **{name: math.inf if value == "inf" else value for name, value in row.items()}
            | {"notes": tuple(row["notes"])}
        )
        for row in rows
    ]


def forbid_loading(monkeypatch) -> None:
    """Fail if a model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("no model should have been loaded")

    monkeypatch.setattr(sweep_run, "load_pipeline", refuse)
    monkeypatch.setattr("sd_tokenmerge.sampling.run.load_pipeline", refuse)


def test_every_number_is_what_a_single_measurement_gives(make_sweep, reference):
    options = make_sweep()
    summary = run_sweep(options)
    folder = folder_of(options)
    assert summary.num_generated == 10
    assert set(summary.files) == RESULTS
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *RESULTS,
        "runs",
        "sweep.json",
    }
    rows = read_rows(folder)
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


def test_a_second_start_generates_nothing_and_writes_the_same(finished, monkeypatch):
    options = finished
    before = snapshot(folder_of(options))
    forbid_loading(monkeypatch)
    monkeypatch.setattr("sd_tokenmerge.sweep.change.paired_change", None)  # cached
    summary = run_sweep(options)
    assert summary.num_generated == 0
    assert set(summary.files) == RESULTS
    after = snapshot(folder_of(options))
    assert {n: data for n, (_, data) in after.items()} == {
        n: data for n, (_, data) in before.items()
    }
    assert not [name for name in changed(before, after) if name.endswith("_0.png")]


def test_the_pipeline_is_loaded_once(make_sweep, monkeypatch):
    loaded: list[int] = []
    original = sweep_run.load_pipeline
    monkeypatch.setattr(
        sweep_run, "load_pipeline", lambda options: loaded.append(1) or original(options)
    )
    run_sweep(make_sweep(methods=("random",)))
    assert loaded == [1]


def test_a_deleted_image_is_remade_and_no_other(finished):
    options = finished
    before = snapshot(folder_of(options))
    image = folder_of(options) / "runs" / "random_keep-0.5" / "18_0.png"
    image.unlink()
    assert run_sweep(options).num_generated == 1
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
    rows = read_rows(folder_of(finished))
    summary = run_sweep(make_sweep(methods=("random",), keep_rates=(0.7, 0.6)))
    assert summary.num_generated == 2
    assert summary.results.rows[:2] == [rows[0], rows[3]]


def test_another_reference_is_measured_but_nothing_is_generated(finished, reference, tmp_path):
    options = finished
    rows = read_rows(folder_of(options))
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    same = run_sweep(replace(options, reference=str(other)))
    assert (same.num_generated, same.results.rows) == (0, rows)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(other / "3.png")
    second = run_sweep(replace(options, reference=str(other)))
    assert second.num_generated == 0
    assert second.results.rows[0].fid != rows[0].fid


@pytest.mark.parametrize("damage", ["delete", "edit"])
def test_a_damaged_result_is_written_again(finished, damage, monkeypatch):
    options = finished
    table = folder_of(options) / "table.md"
    whole = table.read_bytes()
    table.unlink() if damage == "delete" else table.write_bytes(b"my own notes")
    forbid_loading(monkeypatch)
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
    summary = run_sweep(options)
    assert summary.num_generated == 6
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
    rows = read_rows(folder_of(finished))
    other = make_sweep({"merging": MergeConfig(seed=7)}, methods=("random",), keep_rates=(0.5,))
    summary = run_sweep(other, overwrite=True)
    assert summary.num_generated == 2, "unmerged stays"
    assert summary.results.rows[0] == rows[0]
    assert summary.results.rows[1].fid != rows[4].fid
    assert summary.results.conditions["merge seed"] == "7"


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
        ({"merging": MergeConfig(levels=9)}, {}, "`levels` must be in"),
        ({"model": "/nowhere/model"}, {}, "`model` must be"),
        ({"seed": 2**63 - 1}, {}, "`base` must leave seeds below"),
        ({}, {"reference": "/nowhere"}, "`reference` must be a folder of images or an .npz file"),
        ({}, {"features": FeatureOptions(extractor="vgg")}, "`extractor` must be one of"),
        ({}, {"features": FeatureOptions(protocol="best")}, "`protocol` must be one of"),
        ({}, {"methods": ("atc:linkage=ward",)}, "linkage must be single"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(make_sweep, generation, changes, message):
    options = make_sweep(generation, **changes)
    with pytest.raises(ValueError, match=message):
        run_sweep(options)
    assert not folder_of(options).exists()


def one_image(folder: Path, reference: Path) -> None:
    shutil.copy(reference / "0.png", folder)


def truncated_image(folder: Path, reference: Path) -> None:
    shutil.copytree(reference, folder, dirs_exist_ok=True)
    (folder / "3.png").write_bytes((reference / "3.png").read_bytes()[:200])


def several_runs(folder: Path, reference: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(reference, folder / name)
        (folder / name / "run.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_image, "`reference` must hold at least 2 images, got 1"),
        (truncated_image, "3.png' cannot be read"),
        (lambda folder, reference: None, "`reference` must hold images"),
        (several_runs, "`reference` must be one set of images, got .* with runs in it"),
    ],
)
def test_a_bad_reference_is_refused_before_anything_is_generated(
    make_sweep, reference, tmp_path, spoil, message
):
    bad = tmp_path / "bad"
    bad.mkdir()
    spoil(bad, reference)
    options = make_sweep(reference=str(bad))
    with pytest.raises(ValueError, match=message):
        run_sweep(options)
    assert not folder_of(options).exists()


def test_an_unfinished_run_is_no_reference(finished, make_sweep, tmp_path):
    run = folder_of(finished) / "runs" / "unmerged"
    (run / "3_0.png").unlink()
    options = make_sweep(out=str(tmp_path / "other"), reference=str(run))
    with pytest.raises(ValueError, match=r"`reference` must be complete, got .* 1 of 2 images are"):
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
        assert summary.num_generated == generated
        assert summary.results is None
    assert not set(RESULTS) & {path.name for path in folder_of(options).iterdir()}
    summary = run_sweep(options)
    assert summary.num_generated == 0
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


@pytest.mark.parametrize("name", ["{victim}", "../victim.txt", "runs/../../victim.txt"])
def test_an_edited_plan_removes_no_file(finished, tmp_path, name):
    options = finished
    victim = tmp_path / "victim.txt"
    victim.write_text("do not lose this")
    path = folder_of(options) / "sweep.json"
    document = json.loads(path.read_text())
    name = name.format(victim=victim)
    document["settings"][1]["folder"] = name
    document |= {"format": 1, "plan": [], "measurements": {}, "files": [name]}
    document["results"] = {"key": "x", "files": {name: "0" * 64}}
    path.write_text(json.dumps(document))
    assert run_sweep(options).num_generated == 0
    assert victim.read_text() == "do not lose this"


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '{"settings": 3}', '{"settings": [[]]}']
)
def test_a_damaged_plan_is_written_anew(finished, content):
    options = finished
    path = folder_of(options) / "sweep.json"
    whole = path.read_text()
    path.write_text(content)
    assert run_sweep(options).num_generated == 0
    assert path.read_text() == whole


def test_results_without_a_plan_are_refused(finished):
    options = finished
    (folder_of(options) / "sweep.json").unlink()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        run_sweep(options)


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
    run_sweep(options)
    table = (folder_of(options) / "table.md").read_text()
    assert "### FID as published" in table
    assert "ECCV 2024, Table 2" in table
    document = json.loads((folder_of(options) / "table.json").read_text())
    assert len(document["published"]) == 25


def test_the_conditions_say_how_the_images_were_made(finished):
    options = finished
    line = conditions_sentence(run_sweep(options).results.conditions)
    for part in ("N generated 2", "N reference 16", "extractor toy", "protocol atc", "steps 1"):
        assert part in line
    for part in ("size 32x32", "tiny-sd15 (", "dtype float32", "batch 1", "torch 2", "device cpu"):
        assert part in line
    assert str(Path.home()) not in line


def test_a_damaged_cache_is_computed_again(finished, tmp_path):
    rows = read_rows(folder_of(finished))
    entries = list((tmp_path / "cache" / "change").iterdir())
    assert len(entries) == 4
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    assert run_sweep(finished).results.rows == rows
    assert all(entry.stat().st_size > 100 for entry in entries)
