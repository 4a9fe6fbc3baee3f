"""The benchmark of pictures: recipes, caches, statistics, tables, and a run of a few steps."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from benchmarks import quality, quality_tables
from benchmarks.caches import AttentionReuse, DeepCache, count_products
from benchmarks.quality_plot import plot_quality
from benchmarks.quality_recipes import UNMERGED, recipes
from benchmarks.rows import MACHINE, append_rows, read_rows
from benchmarks.unet import COLUMNS as UNET_COLUMNS
from benchmarks.unet import SELF_ATTENTION

from sd_tokenmerge import apply_patch
from sd_tokenmerge.bench.plot import KINDS, Point
from sd_tokenmerge.fid.image_change import ImageChange
from tests.tiny_models import tiny_sd21

STEPS = 5


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd21()


def picture(pipe, steps=STEPS, side=64):
    generator = torch.Generator().manual_seed(0)
    size = {"height": side, "width": side, "num_inference_steps": steps}
    return pipe("a fox", generator=generator, output_type="latent", **size).images


def test_recipes_have_one_name_each():
    small, large = ([one.name for one in recipes(size)] for size in (256, 512))
    assert len({*small}) == len(small)
    assert {*large} < {*small}
    assert large[0] == small[0] == UNMERGED
    assert {*quality.QUICK} <= {*small}
    pairs = {name for pair in quality_tables.PAIRS for name in pair}
    assert pairs <= {*small}


def test_each_recipe_has_its_place_in_the_plot():
    found = {one.name: Point(one.name, 1, 30, 29, 31).kind for one in recipes(256)[1:]}
    assert {*found.values()} == {*KINDS}
    names = (
        "steps-20",
        "dpm-15",
        "kv-tome-sd-25",
        "preset-paper",
        "steps-20-balanced",
    )
    assert [found[name] for name in names] == ["steps", "dpm", "kv", "preset", "both"]


@pytest.mark.parametrize("cache", [AttentionReuse(2), DeepCache(2), DeepCache(2, branch=1)])
def test_caches_change_pictures_start_anew_and_leave_nothing(pipe, cache):
    plain, state = picture(pipe), {name: {*vars(m)} for name, m in pipe.unet.named_modules()}
    with cache(pipe):
        cached = picture(pipe)
        again = picture(pipe)
    assert not torch.allclose(cached, plain, atol=1e-3)
    assert torch.equal(cached, again)
    assert torch.equal(picture(pipe), plain)
    assert {name: {*vars(m)} for name, m in pipe.unet.named_modules()} == state


def test_products_are_counted(pipe):
    # batch of guidance, heads, layers at the finest level, steps, tokens
    full = 2 * 2 * 5 * STEPS * 64**2
    assert count_products(pipe.unet, lambda: picture(pipe)) == full
    with AttentionReuse(2)(pipe):
        assert count_products(pipe.unet, lambda: picture(pipe)) == full * 3 / 5
    with apply_patch(pipe, keep_rate=0.25, merge="kv"):
        assert count_products(pipe.unet, lambda: picture(pipe)) == full / 4
    assert count_products(pipe.unet, lambda: picture(pipe, steps=2)) == full * 2 / 5


def test_statistics_of_the_change():
    changes = [
        ImageChange("x", psnr, ssim, distance)
        for psnr, ssim, distance in ((30, 0.9, 1), (34, 0.8, 3), (math.inf, 1, 0))
    ]
    numbers = quality.change_numbers(changes)
    assert numbers["identical"] == 1
    assert (numbers["psnr_mean"], numbers["psnr_se"]) == (32, 2)  # sqrt(8) / sqrt(2)
    assert numbers["psnr_db_worst"] == 30
    assert numbers["ssim_mean"] == pytest.approx(0.9)
    assert numbers["ssim_se"] == pytest.approx(0.1 / math.sqrt(3))
    assert numbers["feature_distance"] == pytest.approx(4 / 3)
    assert set(numbers) <= set(quality.COLUMNS)


def test_different_pictures_are_not_mixed(tmp_path):
    quality.claim(tmp_path, "4 pictures")
    quality.claim(tmp_path, "4 pictures")
    with pytest.raises(SystemExit, match="has 4 pictures, not 8 pictures: name another --work"):
        quality.claim(tmp_path, "8 pictures")


@pytest.mark.slow
def test_pictures_are_made_once_and_measured(tmp_path):
    options = {"height": 64, "width": 64, "steps": 2, "images_per_class": 1, "device": "cpu"}
    base = quality.GenerateOptions(out="-", model=str(quality.PIPELINE), **options)
    arguments = argparse.Namespace(
        work=tmp_path / "work", out=tmp_path, device="cpu", minutes=60, rounds=1, quick=True
    )
    arguments.references_per_class = 1
    pipe = quality.load_pipeline(base)
    names = (UNMERGED, "kv-25", "reuse-2", "tomesd-50")
    wanted = [one for one in recipes(256) if one.name in names]
    rows = quality.measure_pictures(pipe, wanted, base, arguments)
    assert [row["recipe"] for row in rows] == [one.name for one in wanted]
    stored = {row["recipe"]: row for row in read_rows(tmp_path / "quality.csv")}
    full = int(stored[UNMERGED]["products"])
    costs = {name: int(stored[name]["products"]) / full for name in names}
    assert costs == {UNMERGED: 1, "kv-25": 0.25, "reuse-2": 0.5, "tomesd-50": 0.25}
    assert len(read_rows(tmp_path / "quality_images.csv")) == 48
    assert quality.measure_pictures(pipe, wanted, base, arguments) == []
    timed = quality.measure_times(pipe, wanted, base, arguments)
    assert [row["repeats"] for row in timed] == ["2", "1", "1", "1"]


def test_tables(tmp_path):
    machine = dict.fromkeys(MACHINE, "1")
    base = dict.fromkeys(quality.COLUMNS, "") | machine
    base |= {"size": "256", "images": "3", "references": "9", "named": "0.75"}
    rows = [base | {"recipe": UNMERGED, "products": "200", "fid": "2"}]
    for name, psnr in (("preset-near-lossless", 40), ("steps-20", 30), ("tomesd-50", 20)):
        changes = [ImageChange(f"{i}.png", psnr + 2.0 * i, 0.9, 1.0) for i in range(3)]
        row = {"recipe": name, "products": "50", "delta": "0.25", "delta_se": "0.125"}
        rows.append(base | row | quality.change_numbers(changes))
        append_rows(
            tmp_path / "quality_images.csv",
            quality.IMAGE_COLUMNS,
            [
                {"size": "256", "recipe": name, "file": one.file, "psnr_db": one.psnr}
                for one in changes
            ],
        )
    append_rows(tmp_path / "quality.csv", quality.COLUMNS, rows)
    times = [
        dict.fromkeys(quality.TIME_COLUMNS, "1")
        | {"size": "256", "recipe": name, "relative": relative}
        for name, relative in (
            (UNMERGED, "1"),
            ("preset-near-lossless", "0.75"),
            ("steps-20", "0.8"),
        )
    ]
    append_rows(tmp_path / "quality_time.csv", quality.TIME_COLUMNS, times)
    text = quality_tables.quality(tmp_path)
    assert "**256 px**: 3 pictures, 9 references; 1, 1 thread, torch 1, commit 1." in text
    assert (
        "| preset-near-lossless | 25 % | 0.75 | 42.0 (40.0 to 44.0) | 40.0 | 42.0 ± 1.2 |" in text
    )
    assert "| 0.900 ± 0.000 | 1.00 ± 0.00 | 75 % | 0.2 ± 0.1 |" in text
    assert "| tomesd-50 | 25 % | - | 22.0" in text  # was not timed
    assert "| unmerged | 100 % | 1.00 | - | - | - | - | - | 75 % | 2.0 (itself) |" in text
    assert "| 256 px | preset-near-lossless minus steps-20 | +10.0 ± 0.0 | 3 of 3 |" in (
        quality_tables.paired(tmp_path)
    )
    lines = quality_tables.frontier_table(tmp_path).splitlines()[4:]
    assert lines == [
        "| 256 px | preset-near-lossless | 0.75 | 42.0 | 42.0 ± 1.2 | 75 % | 0.2 ± 0.1 |"
    ]
    plot_quality(tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000

    assert quality_tables.presets(tmp_path) == "Not run."
    step = dict.fromkeys(UNET_COLUMNS, "1") | {"benchmark": SELF_ATTENTION, "case": "sd15-512"}
    step |= {"contestant": "tomesd-50", "speedup": "1.254"}
    append_rows(tmp_path / "unet.csv", UNET_COLUMNS, [step])
    assert "| `tomesd-50` | 25 % | 80 % | - | - | 22.0 ± 1.2 | - | - | - |" in (
        quality_tables.presets(tmp_path)
    )
