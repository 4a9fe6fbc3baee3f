from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.report.plot import plot_change, plot_distance, png_bytes
from sd_tokenmerge.report.published import atc_table2
from sd_tokenmerge.report.rows import conditions_sentence
from tests.report.example import CONDITIONS, example_rows


def drawn(axes) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Values, lower and upper ends of the bars of every method drawn."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        found[container.get_label()] = (line.get_ydata(), ends[:, 0], ends[:, 1])
    return found


def test_points_and_bars_are_the_rows():
    figure = plot_distance(example_rows())
    lines = drawn(figure.axes[0])
    assert set(lines) == {"atc:linkage=single", "random"}
    values, low, high = lines["random"]
    assert list(values) == pytest.approx([43, 45, 46])
    assert list(values - low) == pytest.approx([0.2] * 3), "bars are the paired error"
    assert list(high - values) == pytest.approx([0.2] * 3)


def test_without_paired_errors_the_bars_are_those_of_the_distance():
    rows = [replace(row, delta_se=None) for row in example_rows()]
    values, low, _ = drawn(plot_distance(rows).axes[0])["random"]
    assert list(values - low) == pytest.approx([1.5] * 3)


def test_the_baseline_is_a_labelled_line_at_its_distance():
    axes = plot_distance(example_rows()).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "unmerged"]
    assert set(line.get_ydata()) == {40.0}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100 %", "70 %", "50 %", "40 %"]
    left, right = axes.get_xlim()
    assert left > right, "more merging is further right"


def test_published_values_are_drawn_only_in_their_own_unit():
    ours = plot_distance(example_rows(), published=atc_table2()).axes[0]
    assert not [line for line in ours.lines if "paper" in str(line.get_label())]
    same = plot_distance(example_rows(extractor="inception"), published=atc_table2()).axes[0]
    (line,) = [line for line in same.lines if line.get_label() == "Δ of ATC average (paper)"]
    assert line.get_ydata()[0] == 40
    assert line.get_ydata()[-1] == pytest.approx(40 - 0.58)


def test_change_bars_reach_from_the_20th_to_the_80th_percentile():
    figure = plot_change(example_rows())
    psnr, ssim = figure.axes
    values, low, high = drawn(psnr)["random"]
    assert list(values) == pytest.approx([37, 35, 34])
    assert list(values - low) == pytest.approx([2] * 3)
    assert list(high - values) == pytest.approx([3] * 3)
    assert list(drawn(ssim)["random"][0]) == pytest.approx([0.96, 0.94, 0.93])


def test_change_without_ssim_has_one_panel():
    rows = [replace(row, ssim=None) for row in example_rows()]
    assert len(plot_change(rows).axes) == 1


def test_nothing_to_plot_is_an_error():
    rows = [replace(row, fid=None, psnr_db=None) for row in example_rows()]
    with pytest.raises(ValueError, match="at least one distance"):
        plot_distance(rows)
    with pytest.raises(ValueError, match="finite PSNR"):
        plot_change(rows)


@pytest.mark.parametrize("make", [plot_distance, plot_change])
def test_the_same_rows_give_the_same_file_and_it_is_a_picture(make):
    first, second = (
        png_bytes(make(example_rows(), caption=conditions_sentence(CONDITIONS))) for _ in "ab"
    )
    assert first == second
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.width > 900
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_nine_methods_remain_distinguishable():
    rows = example_rows()
    many = [rows[0]] + [
        replace(row, method="random", label=f"method {i}")
        for i in range(9)
        for row in rows
        if row.method == "random"
    ]
    axes = plot_distance(many).axes[0]
    styles = {
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle())
        for c in axes.containers
    }
    assert len(styles) == 9


@pytest.mark.parametrize("make", [plot_distance, plot_change])
def test_dollars_are_no_formula(make):
    rows = [replace(row, label=f"$\\frac{{ {row.label}$") for row in example_rows()]
    assert png_bytes(make(rows, caption="model ~/$HOME_{/$x"))


@pytest.mark.filterwarnings("error")
def test_characters_that_the_font_lacks_are_silent():
    assert png_bytes(plot_distance(example_rows(), caption="model 模型"))
