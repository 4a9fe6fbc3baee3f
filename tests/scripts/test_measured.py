"""Every number in a measured table of docs/ is that of a committed row."""

import json

import measured
import pytest

DOCUMENTS = sorted(measured.DOCS.glob("*.md"))
ROWS = sorted(measured.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_rows(path):
    text = path.read_text()
    assert measured.fill(text) == text, "run `python scripts/measured.py`"


def test_every_measurement_is_shown_somewhere():
    shown = "".join(path.read_text() for path in DOCUMENTS)
    for path in ROWS:
        assert f"<!-- measured: {path.stem} -->" in shown


def test_a_table_says_what_was_run_where():
    document = measured.describe([{"N": 400, "ratio": 0.97531, "time": None}], "python x.py")
    assert measured.table(json.loads(json.dumps(document))).splitlines()[:4] == [
        "| N | ratio | time |",
        "| --- | --- | --- |",
        "| 400 | 0.975 |  |",
        "",
    ]
    assert f"commit {document['commit'][:9]}" in measured.table(document)
