from __future__ import annotations

from sd_tokenmerge.bench.plot import Point
from sd_tokenmerge.bench.verdict import verdict


def points(**places):
    names = {name.replace("_", "-"): place for name, place in places.items()}
    return [Point(name, time, psnr, psnr, psnr) for name, (time, psnr) in names.items()]


def test_what_fewer_steps_do_not_beat_pays():
    first, second = verdict(
        points(steps_20=(0.8, 40), steps_15=(0.6, 30), preset_a=(0.7, 35), preset_b=(0.7, 29))
    )
    assert first == "What pays here: preset-a (0.70 of the time, 35.0 dB)."
    assert second == (
        "What doesn't: preset-b (0.70 of the time, 29.0 dB; steps-15: 0.60 of the time, 30.0 dB)."
    )


def test_what_saves_no_time_does_not_pay():
    first, second = verdict(points(steps_20=(0.8, 40), preset_a=(0.99, 50), tomesd_50=(0.9, 39)))
    assert first == (
        "No kind of merging that was tried pays here; fewer steps do, such as steps-20 "
        "(0.80 of the time, 40.0 dB)."
    )
    assert "preset-a (0.99 of the time, 50.0 dB: no faster) and tomesd-50 (0.90" in second


def test_everything_pays_where_fewer_steps_are_far_away():
    first, second = verdict(points(steps_20=(0.8, 20), preset_a=(0.9, 30), preset_b=(0.7, 19)))
    assert "preset-a (0.90 of the time, 30.0 dB) and preset-b" in first
    assert second == "Everything that was tried pays."
    assert verdict(points(steps_20=(1.1, 20), preset_a=(1.2, 30)))[0] == (
        "Nothing that was tried pays here."
    )
