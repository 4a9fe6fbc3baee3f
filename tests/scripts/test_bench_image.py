"""The benchmark of pictures: its arithmetic, and a run on the sample pipeline's configuration."""

from __future__ import annotations

import argparse

import bench_image
import pytest
import render_benchmarks
import torch
from bench_image import FIELDS, Painter, Picture
from bench_rows import MACHINE_FIELDS, append_rows
from pipeline_contestants import CONTESTANTS
from timed_unet import Case

ROOT = bench_image.ROOT
MACHINE = dict.fromkeys(MACHINE_FIELDS, "1") | {"dtype": "float32"}


@pytest.fixture(scope="module")
def painter():
    arguments = argparse.Namespace(steps=2, device="cpu", dtype="float32")
    return Painter(ROOT / "samples", "quick", Case("pipeline", 128), arguments)


def test_contestants_are_known():
    assert set(bench_image.DEFAULT) <= CONTESTANTS.keys()


def test_speed_is_in_calls_of_the_time(tmp_path, capsys):
    """The machine is half as fast during the second picture of each."""
    pictures = {
        "unpatched": [Picture(100, 90, 21, 4), Picture(200, 180, 21, 8)],
        "tomesd-50": [Picture(80, 70, 21, 4), Picture(160, 140, 21, 8)],
    }
    rows = bench_image.rows(pictures, "sd15-512", 20)
    assert [row["speedup"] for row in rows] == ["1.000", "1.250"]
    assert [row["image_s"] for row in rows] == ["150.00", "120.00"]
    append_rows(tmp_path / "image.csv", FIELDS, [row | MACHINE for row in rows])
    text = render_benchmarks.images(tmp_path)
    assert "| tomesd-50 | 120.00 (80.00 to 160.00) | 2 | 105.0 | 6000 | 1.250 |" in text
    assert "**sd15-512**, float32, 20 steps, 21 calls of the UNet" in text


def test_pictures_of_a_small_model(painter, capsys):
    contestants = [CONTESTANTS[name] for name in ("unpatched", "preset-fast", "tomesd-50")]
    pictures = painter.run(contestants, 1e9, 2)
    assert {name: len(taken) for name, taken in pictures.items()} == dict.fromkeys(pictures, 2)
    for picture in (one for taken in pictures.values() for one in taken):
        assert picture.unet_calls == 2
        assert 0 < picture.unet < picture.image
        assert picture.unpatched_call > 0
    rows = [row | MACHINE for row in bench_image.rows(pictures, "quick", 2)]
    assert all(row.keys() == set(FIELDS) for row in rows)


def test_a_picture_that_is_not_finite_stops_it(painter, monkeypatch):
    bias = painter.calls.unet.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(SystemExit, match="the picture of unpatched is not finite"):
        painter.paint(CONTESTANTS["unpatched"])
