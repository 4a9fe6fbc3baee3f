"""The documents show the committed rows."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import render
from benchmarks import fid


@pytest.mark.parametrize("document", render.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_rows(document):
    text = document.read_text(encoding="utf-8")
    assert render.render(text) == text, "run `python scripts/render.py`"


def test_every_table_is_in_one_document():
    texts = [document.read_text(encoding="utf-8") for document in render.DOCUMENTS]
    marks = Counter(re.findall(r"<!-- (begin \S+|end \S+) -->", "".join(texts)))
    expected = {f"{mark} {name}" for name in render.TABLES for mark in ("begin", "end")}
    assert marks == dict.fromkeys(expected, 1)


def test_unknown_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a block must be one of unet, .*, got 'speed'"):
        render.render("<!-- begin speed --><!-- end speed -->", tmp_path)


def test_without_rows(tmp_path):
    assert {make(tmp_path) for make in render.TABLES.values()} == {"Not run."}


def test_only_the_text_between_markers_changes(tmp_path):
    text = render.render("a <!-- begin unet -->old<!-- end unet --> b", tmp_path)
    assert text == "a <!-- begin unet -->\n\nNot run.\n\n<!-- end unet --> b"


def test_the_steps_of_a_distance_are_timed(tmp_path):
    rows = fid.distance(40, 60, 8)
    assert [row["step"] for row in rows][:2] == ["fit the reference", "distance"]
    assert all(float(row["s"]) > 0 for row in rows)


def test_a_plain_table_shows_what_was_measured_last():
    row = dict.fromkeys(fid.DISTANCE_COLUMNS, "1") | {"step": "old", "date": "2026-01-01T00:00"}
    rows = [row, row | {"step": "new", "date": "2026-01-02T00:00"}]
    text = fid.plain_table(rows)
    assert text.splitlines() == [
        *("| step | s |", "| --- | --- |", "| new | 1 |", ""),
        "1, 1 thread(s), torch 1, commit 1, 2026-01-02.",
    ]
