"""The benchmark of pictures: settings, statistics, tables, and a run of a few steps."""

from __future__ import annotations

import argparse
import math

import pytest
from benchmarks import quality, quality_tables
from benchmarks.quality_plot import plot_quality
from benchmarks.quality_settings import UNMERGED, all_settings, attention_cost, setting_columns
from benchmarks.rows import MACHINE, append_rows, read_rows
from benchmarks.unet import COLUMNS as UNET_COLUMNS
from benchmarks.unet import STEP

from sd_tokenmerge import MergeConfig
from tests.tiny_models import tiny_unet


def test_settings_have_one_name_each_and_can_be_applied():
    settings, unet = all_settings(), tiny_unet()
    assert len({setting.name for setting in settings}) == len(settings)
    assert settings[0].name == UNMERGED
    for setting in settings:
        assert {*setting_columns(setting)} <= set(quality.COLUMNS)
        assert setting.refresh_every in (1, quality.STEPS)
        with setting.on(unet):
            pass


def test_settings_are_described():
    known = {setting.name: setting_columns(setting) for setting in all_settings()}
    names = ("method", "merge", "sizes", "keep_rate", "refresh_every", "attention_cost")
    described = {
        name: [known[name][column] for column in names]
        for name in (UNMERGED, "kv-10", "tomesd-25", "preset-fast")
    }
    assert described == {
        UNMERGED: ["none", "qkv", "False", "1", "1", "1"],
        "kv-10": ["atc", "kv", "False", "0.1", "1", "0.1"],
        "tomesd-25": ["tomesd", "qkv", "False", "0.25", "1", "0.0625"],
        "preset-fast": ["atc", "kv", "True", "0.1", "5", "0.1"],
    }


@pytest.mark.parametrize(("merge", "cost"), [("qkv", 0.0625), ("kv", 0.25), ("q", 0.25)])
def test_attention_cost(merge, cost):
    assert attention_cost(MergeConfig(keep_rate=0.25, merge=merge)) == cost


def test_statistics_of_the_change():
    images = [
        {"psnr": psnr, "ssim": ssim, "feature_distance": distance}
        for psnr, ssim, distance in ((30, 0.9, 1), (34, 0.8, 3), (math.inf, 1, 0))
    ]
    numbers = quality.change_numbers(images)
    assert numbers["identical"] == 1
    assert (numbers["psnr_mean"], numbers["psnr_se"]) == (32, 2)  # sqrt(8) / sqrt(2)
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
    sample = quality.SamplePipeline()
    sample.settings |= {"num_inference_steps": 1, "height": 64, "width": 64}
    arguments = argparse.Namespace(
        work=tmp_path / "work", out=tmp_path, device="cpu", minutes=60, batch_size=12, model="m"
    )
    arguments.images_per_class = arguments.references_per_class = 1
    settings = [one for one in all_settings() if one.name in (UNMERGED, "kv-10", "tomesd-50")]
    rows = quality.measure_pictures(sample, settings, arguments)
    assert [row["setting"] for row in rows] == [one.name for one in settings]
    assert read_rows(tmp_path / "quality.csv")[1]["images"] == "12"
    assert len(read_rows(tmp_path / "quality_images.csv")) == 24
    assert quality.measure_pictures(sample, settings, arguments) == []


def images(psnr):
    return [
        {"file": f"{i}.png", "psnr": psnr + 2.0 * i, "ssim": 0.9, "feature_distance": 1.0}
        for i in range(3)
    ]


def test_tables(tmp_path):
    machine = dict.fromkeys(MACHINE, "1")
    base = dict.fromkeys(quality.COLUMNS, "") | machine | {"images": "3", "references": "9"}
    rows = [base | {"setting": UNMERGED, "attention_cost": "1", "fid": "2", "keep_rate": "1"}]
    for name, psnr in (("qkv-50", 40), ("tomesd-50", 30)):
        row = {"setting": name, "attention_cost": "0.5", "keep_rate": "0.5"}
        rows.append(base | row | quality.change_numbers(images(psnr)) | {"delta": 0.25})
        rows[-1]["delta_se"] = 0.125
        changes = [
            {
                "setting": name,
                "file": one["file"],
                "psnr_db": one["psnr"],
                "ssim": 1,
                "feature_distance": 1,
            }
            for one in images(psnr)
        ]
        append_rows(tmp_path / "quality_images.csv", quality.IMAGE_COLUMNS, changes)
    append_rows(tmp_path / "quality.csv", quality.COLUMNS, rows)
    times = [
        dict.fromkeys(quality.TIME_COLUMNS, "1") | {"setting": "qkv-50", "relative": "1.25"},
        dict.fromkeys(quality.TIME_COLUMNS, "1") | {"setting": UNMERGED},
    ]
    append_rows(tmp_path / "quality_time.csv", quality.TIME_COLUMNS, times)
    text = quality_tables.quality(tmp_path)
    assert "| qkv-50 | 50 % | 42.0 (40.0 to 44.0) | 42.0 ± 1.2 | 0.900 ± 0.000 |" in text
    assert "| 0.25 ± 0.12 | 1.25 |" in text
    assert "| 0.25 ± 0.12 | - |" in text  # tomesd was not timed
    assert "| unmerged | 100 % | - | - | - | - | 2.00 (itself) | 1.00 |" in text
    paired = quality_tables.paired(tmp_path)
    assert "| qkv-50 minus tomesd-50 | +10.00 ± 0.00 | 3 of 3 |" in paired
    plot_quality(tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000

    assert quality_tables.presets(tmp_path) == "Not run."
    step = dict.fromkeys(UNET_COLUMNS, "1") | {"benchmark": STEP, "case": "sd15-512"}
    step |= {"contestant": "tomesd-50", "speedup": "1.254"}
    append_rows(tmp_path / "unet.csv", UNET_COLUMNS, [step])
    text = quality_tables.presets(tmp_path)
    assert "| the `tomesd` package | 50 % | 1.25x | - | 0 | +0.2 ± 0.1 |" in text
    assert "ATC as in its paper | 50 % | - | - | +10.0 ± 0.0 dB | +0.2 ± 0.1 |" in text
