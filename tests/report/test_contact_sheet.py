from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet, side_by_side

COLOURS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (180, 150, 20)]
EMPTY = (236, 234, 228)


@pytest.fixture
def pictures(tmp_path):
    files = []
    for i, colour in enumerate(COLOURS):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (64, 64), colour).save(files[-1])
    return files


def blocks(sheet: Image.Image) -> list[tuple[tuple[int, int, int], tuple[int, int, int, int]]]:
    """Colour and bounding box of every picture found on a sheet, in reading order."""
    pixels = np.asarray(sheet)
    found = []
    for colour in [*COLOURS, EMPTY]:
        rows, columns = np.nonzero((pixels == colour).all(-1))
        if rows.size:
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append((colour, tuple(map(int, box))))
    return sorted(found, key=lambda item: (item[1][1], item[1][0]))


def test_rows_are_methods_and_columns_keep_rates(pictures):
    grid = PictureGrid(
        "A prompt.", ["atc", "random"], ["100 %", "50 %"], [pictures[:2], pictures[2:]]
    )
    found = blocks(contact_sheet([grid], cell=64, grids_per_row=1))
    assert [colour for colour, _ in found] == COLOURS
    boxes = [box for _, box in found]
    assert all((right - left, low - top) == (64, 64) for left, top, right, low in boxes)
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] == boxes[2][0]
    assert boxes[0][2] < boxes[1][0]
    assert boxes[0][3] < boxes[2][1]


def test_labels_are_drawn_left_of_and_above_the_pictures(pictures):
    grid = PictureGrid(
        "A prompt.", ["atc", "random"], ["100 %", "50 %"], [pictures[:2], pictures[2:]]
    )
    sheet = contact_sheet([grid], cell=64, grids_per_row=1)
    (left, top, right, low), *_ = [box for _, box in blocks(sheet)]
    dark = np.asarray(sheet.convert("L")) < 100
    assert dark[top:low, :left].sum() > 20, "row label"
    assert dark[:top, left:right].sum() > 20, "column label and heading"
    assert not dark[:, 0].any()
    assert not dark[0].any()


def test_a_missing_picture_is_an_empty_cell(pictures):
    grid = PictureGrid("", ["atc"], ["100 %", "50 %"], [[pictures[0], None]])
    found = blocks(contact_sheet([grid], cell=64))
    assert [colour for colour, _ in found] == [COLOURS[0], EMPTY]


def test_grids_are_laid_out_in_rows_and_nothing_is_cut(pictures):
    grids = [PictureGrid(f"Prompt {i}", ["a"], ["b"], [[file]]) for i, file in enumerate(pictures)]
    found = blocks(contact_sheet(grids, cell=48, grids_per_row=3, caption="conditions " * 30))
    assert [colour for colour, _ in found] == COLOURS
    assert {(box[2] - box[0], box[3] - box[1]) for _, box in found} == {(48, 48)}
    assert len({box[1] for _, box in found}) == 2


def test_pictures_keep_their_aspect_ratio(tmp_path):
    Image.new("RGB", (120, 60), COLOURS[0]).save(tmp_path / "wide.png")
    grid = PictureGrid("", ["a"], ["b"], [[tmp_path / "wide.png"]])
    ((_, (left, top, right, low)),) = blocks(contact_sheet([grid], cell=64))
    assert (right - left, low - top) == (64, 32)


def test_side_by_side_shows_both_at_the_asked_size(pictures):
    sheet = side_by_side(
        [(pictures[0], pictures[1])], ("unmerged", "50 %"), headings=["A magpie."], cell=96
    )
    found = blocks(sheet)
    assert [colour for colour, _ in found] == COLOURS[:2]
    assert all(box[2] - box[0] == 96 for _, box in found)
    assert found[0][1][1] == found[1][1][1]


def test_a_broken_picture_is_named(tmp_path, pictures):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:40])
    grid = PictureGrid("", ["a"], ["b", "c"], [[pictures[0], broken]])
    with pytest.raises(OSError, match=r"broken\.png` is not a readable picture"):
        contact_sheet([grid])


def test_labels_and_cells_must_match(pictures):
    with pytest.raises(ValueError, match="zip"):
        contact_sheet([PictureGrid("", ["a"], ["b", "c"], [[pictures[0]]])])
    with pytest.raises(ValueError, match="zip"):
        contact_sheet([PictureGrid("", ["a", "b"], ["c"], [[pictures[0]]])])


@pytest.mark.parametrize("prompt", ["a house\nin two lines", "a\r\nhouse\u2028", "long " * 100_000])
def test_any_prompt_can_be_a_heading(pictures, prompt):
    grid = PictureGrid(prompt, [prompt[:20]], ["100 %"], [[pictures[0]]])
    found = blocks(contact_sheet([grid], cell=64))
    assert [colour for colour, _ in found] == COLOURS[:1]
