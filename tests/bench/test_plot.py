"""The frontier, and the plot against time."""

from __future__ import annotations

from sd_tokenmerge.bench.plot import Point, frontier, plot_against_time


def test_the_frontier_has_what_no_other_beats():
    places = {"a": (0.5, 30), "b": (0.6, 29), "c": (0.5, 28), "d": (0.9, 40), "e": (1, 50)}
    points = [Point(name, time, psnr, psnr, psnr) for name, (time, psnr) in places.items()]
    assert [point.name for point in frontier(points)] == ["a", "d"]
    assert frontier([]) == []


def test_one_panel_for_each_title(tmp_path):
    points = [Point("steps-20", 0.8, 40, 38, 43), Point("preset-fast", 0.9, 30, 28, 31)]
    for count in (1, 2):
        panels = {f"{number}": points for number in range(count)}
        plot_against_time(panels, tmp_path / f"{count}.png", full="25 steps", bars="all pictures")
    assert (tmp_path / "1.png").stat().st_size < (tmp_path / "2.png").stat().st_size
