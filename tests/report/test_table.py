from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest

from sd_tokenmerge.report.published import atc_table2
from sd_tokenmerge.report.rows import SweepRow, conditions_sentence
from sd_tokenmerge.report.table import csv_text, json_text, latex, markdown
from tests.report.example import CONDITIONS, example_rows


def sections(text: str) -> dict[str, list[list[str]]]:
    """The tables of a Markdown document by title, as rows of cells, the rule left out."""
    tables = {}
    for part in text.split("### ")[1:]:
        title, *lines = part.splitlines()
        cells = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines
            if line.startswith("|")
        ]
        tables[title] = [cells[0], *cells[2:]]
    return tables


def test_methods_by_keep_rates_with_the_unmerged_value_in_each_row():
    tables = sections(markdown(example_rows(), CONDITIONS))
    assert tables["Fréchet distance (efficientnet-lite0)"] == [
        ["method", "100 %", "70 %", "50 %", "40 %"],
        [
            "atc:linkage=single",
            "40.00 ± 1.50",
            "**40.30 ± 1.50**",
            r"**40.50 ± 1.50\***",
            r"**40.60 ± 1.50\***",
        ],
        ["random", "40.00 ± 1.50", r"43.00 ± 1.50\*", r"45.00 ± 1.50\*", r"46.00 ± 1.50\*"],
    ]
    assert tables["Fréchet distance (efficientnet-lite0): difference to unmerged"][1:] == [
        ["atc:linkage=single", "+0.30 ± 0.20", r"+0.50 ± 0.20\*", r"+0.60 ± 0.20\*"],
        ["random", r"+3.00 ± 0.20\*", r"+5.00 ± 0.20\*", r"+6.00 ± 0.20\*"],
    ]
    psnr = tables["PSNR to the unmerged image of the same seed (dB, median)"]
    assert psnr[1] == ["atc:linkage=single", "39.7", "39.5", "39.4"]


def test_the_long_table_lists_every_measurement():
    table = sections(markdown(example_rows(), CONDITIONS))["All measurements"]
    assert len(table) == 1 + 7
    assert table[0][:2] == ["method", "keep rate"]
    assert table[0][3:] == ["Δ to unmerged", "KID x 10³", "PSNR (dB)", "SSIM", "s/image"]
    assert table[1][0] == "unmerged"
    assert table[1][3] == "\N{EN DASH}"
    assert table[2][4:] == ["12.80 ± 1.00", "39.7", "0.987", "1.50"]


def test_what_was_not_measured_has_no_column_and_no_explanation():
    rows = [
        SweepRow(method="atc", label="atc", keep_rate=k, seconds_per_image=2 * k)
        for k in (1.0, 0.5)
    ]
    text = markdown(rows, CONDITIONS)
    assert sections(text) == {
        "All measurements": [
            ["method", "keep rate", "s/image"],
            ["atc", "100 %", "2.00"],
            ["atc", "50 %", "1.00"],
        ]
    }
    assert "standard error" not in text
    assert "Bold" not in text


def test_the_signs_are_explained_and_the_conditions_and_notes_printed():
    text = markdown(example_rows(), CONDITIONS, notes=["tome cannot reach 40 %."])
    assert r"- \*: differs from unmerged by more than two standard errors" in text
    assert "- ±: one standard error." in text
    assert "- Bold: lowest of its column" in text
    assert "- ∞: identical images." in text
    assert "- tome cannot reach 40 %." in text
    assert text.rstrip().endswith(f"Conditions: {conditions_sentence(CONDITIONS)}")


def test_a_missing_setting_is_a_dash():
    rows = [row for row in example_rows() if (row.method, row.keep_rate) != ("random", 0.5)]
    table = sections(markdown(rows, CONDITIONS))["Fréchet distance (efficientnet-lite0)"]
    assert table[2][3] == "\N{EN DASH}"
    assert table[1][3].startswith("**40.50")


def test_markdown_columns_are_aligned_in_plain_text():
    for part in markdown(example_rows(), CONDITIONS).split("### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1


def test_published_rows_stand_below_ours_only_where_the_unit_is_the_same():
    ours = example_rows(extractor="inception")
    same = sections(markdown(ours, CONDITIONS, published=atc_table2()))
    table = same["FID"]
    assert [row[0] for row in table] == [
        "method",
        "atc:linkage=single",
        "random",
        "",
        "ToMe (paper)",
        "ATC single (paper)",
        "ATC average (paper)",
        "ATC complete (paper)",
    ]
    assert table[0][1:] == ["100 %", "90 %", "80 %", "70 %", "60 %", "50 %", "40 %"]
    assert table[6][7] == "**33.22**"
    assert same["FID: difference to unmerged"][-2][-1] == "\N{MINUS SIGN}0.58"

    other = sections(markdown(example_rows(), CONDITIONS, published=atc_table2()))
    assert len(other["Fréchet distance (efficientnet-lite0)"]) == 3
    assert len(other["FID as published"]) == 5


def test_rows_that_are_not_comparable_make_no_table():
    rows = example_rows()
    rows[3] = replace(rows[3], num_generated=12)
    for make in (markdown, latex):
        with pytest.raises(ValueError, match="num_generated"):
            make(rows, CONDITIONS)


def test_latex_is_balanced_and_escaped():
    rows = [replace(row, label=row.method.replace("random", "a_b&c%")) for row in example_rows()]
    text = latex(rows, CONDITIONS, published=atc_table2())
    tables = text.split(r"\begin{table}")[1:]
    assert len(tables) == 5
    for table in tables:
        columns = len(re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", table).group(1))
        body = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert body
        assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body)
        unescaped = re.sub(r"\\[{}%&_$]", "", table)
        assert unescaped.count("{") == unescaped.count("}")
        assert unescaped.count("$") % 2 == 0
        assert not re.search(r"(?<!\\)[%_#]", table.replace("% needs", ""))
        assert table.isascii() or not set("±−–Δ∞³*") & set(table.replace("$^{*}$", ""))  # noqa: RUF001
    assert r"a\_b\&c\%" in text
    assert r"\textbf{40.60 $\pm$ 1.50$^{*}$}" in text


def test_csv_keeps_full_precision():
    rows = [replace(row, fid=(row.fid or 0) + 1 / 3) for row in example_rows()]
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert len(read) == len(rows)
    for text, row in zip(read, rows, strict=True):
        assert text["method"] == row.method
        assert float(text["fid"]) == row.fid
        assert (float(text["delta"]) if text["delta"] else None) == row.delta
        assert float(text["psnr_db"]) == row.psnr_db


def test_json_holds_every_field_and_infinities_as_text():
    rows = [replace(row, notes=("a note",)) for row in example_rows()]
    text = json_text(rows, CONDITIONS, published=atc_table2(), notes=["another"])
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (document["conditions"], document["notes"]) == (CONDITIONS, ["another"])
    assert len(document["published"]) == 25
    assert document["rows"][0]["psnr_db"] == "inf"
    expected = rows[3].as_dict() | {"notes": ["a note"]}
    assert document["rows"][3] == expected


def test_json_refuses_nan():
    rows = [replace(row, fid=float("nan")) for row in example_rows()]
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(rows, CONDITIONS)


def test_names_are_text_and_no_markup():
    names = "<b>x</b> # | `c` [a](b) _i_ a_b 5 * 3\n# title"
    rows = [replace(row, label=f"{row.label} {names}") for row in example_rows()]
    text = markdown(rows, {"model": names}, notes=[names])
    escaped = r"\<b\>x\</b\> \# \| \`c\` \[a\](b) \_i\_ a_b 5 \* 3 \# title"
    assert f"| random {escaped} " in text
    assert f"- {escaped}\n" in text
    assert f"Conditions: model {escaped}." in text
    for cells in sections(text)["All measurements"]:
        assert len(cells) == 8
