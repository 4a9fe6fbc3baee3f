"""The notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"


def read_tour():
    return nbformat.read(DOCS / "tour.ipynb", as_version=4)


@pytest.mark.slow
def test_it_runs():
    tour = read_tour()
    for cell in tour.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(tour, timeout=600, resources={"metadata": {"path": DOCS}}).execute()
    assert sum("image/jpeg" in str(cell.get("outputs")) for cell in tour.cells) == 4


def test_it_is_committed_executed_and_small():
    code = [cell for cell in read_tour().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert (DOCS / "tour.ipynb").stat().st_size < 2**19
