from __future__ import annotations

import re

import pytest

from sd_tokenmerge.methods import parse_method
from sd_tokenmerge.report.published import atc_table2
from sd_tokenmerge.sampling.options import NO_METHOD


def test_every_value_of_table_2_is_quoted_as_printed(shared):
    text = (shared / "papers" / "atc.md").read_text()
    table = text[text.index("Table 2: Stable Diffusion FID") :]
    lines = re.search(r"r \(%\)[^\n]*\n(?:[^\n]*\n){4}", table).group().splitlines()
    keep_rates = [int(value) for value in lines[0].split("\t")[1:]]
    rows = atc_table2()
    names = ["ToMe", "ATC single", "ATC average", "ATC complete"]
    for name, line in zip(names, lines[1:], strict=True):
        printed = [float(value) for value in re.findall(r"\d\d\.\d\d", line)]
        ours = {r.keep_rate: r.fid for r in rows if r.label in (f"{name} (paper)", rows[0].label)}
        assert printed == [ours[keep_rate / 100] for keep_rate in keep_rates]


def test_the_rows_say_how_they_were_measured():
    rows = atc_table2()
    assert len(rows) == 1 + 4 * 6
    assert {row.source for row in rows} == {"published"}
    assert {(row.num_generated, row.num_reference) for row in rows} == {(2000, 5000)}
    assert [row.method for row in rows].count(NO_METHOD) == 1
    best = min((row for row in rows if row.delta is not None), key=lambda row: row.delta)
    assert (best.label, best.keep_rate, best.delta) == ("ATC average (paper)", 0.4, -0.58)


@pytest.mark.parametrize("row", atc_table2()[1:], ids=lambda row: row.label)
def test_each_published_method_is_one_of_ours(row):
    assert str(parse_method(row.method)) == row.method
