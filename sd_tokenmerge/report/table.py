"""Tables of a sweep as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from sd_tokenmerge.report.cells import TextTable, listing, pivots
from sd_tokenmerge.report.rows import SweepRow, conditions_sentence

SCHEMA = 2
"""Version of the JSON document's layout."""


def markdown(
    rows: Sequence[SweepRow],
    conditions: Mapping[str, str],
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    """Tables of methods by keep rates, then every measurement, then the conditions.

    Args:
        rows: measured rows that are comparable with one another.
        conditions: conditions that all rows share, printed below the tables.
        published: rows to show below the measured ones of the same table.
        notes: sentences to print below the tables.

    Returns:
        A Markdown document, with columns that are aligned in plain text as well.

    Raises:
        ValueError: the rows are not comparable, or there are none.
    """
    tables = [*pivots(rows, published), listing(rows)]
    parts = [f"### {_markdown_escape(table.title)}\n\n{_markdown_table(table)}" for table in tables]
    sentences = dict.fromkeys([text for table in tables for text in table.legend] + [*notes])
    parts.append("\n".join(f"- {_markdown_escape(sentence)}" for sentence in sentences))
    parts.append(f"Conditions: {_markdown_escape(conditions_sentence(conditions))}")
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(
    rows: Sequence[SweepRow],
    conditions: Mapping[str, str],
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    r"""Tables of methods by keep rates, for `\usepackage{booktabs}`.

    Args:
        rows: measured rows that are comparable with one another.
        conditions: part of each caption.
        published: rows to show below the measured ones.
        notes: sentences for each caption.

    Returns:
        A `table` environment for each of the tables of methods by keep rates.

    Raises:
        ValueError: the rows are not comparable, or there are none.
    """
    ending = [*notes, f"Conditions: {conditions_sentence(conditions)}"]
    parts = [_latex_table(table, [*table.legend, *ending]) for table in pivots(rows, published)]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def csv_text(rows: Sequence[SweepRow]) -> str:
    """One line per row with all numbers at full precision; empty if not measured."""
    out = io.StringIO()
    names = [name for name in rows[0].as_dict() if name != "notes"]
    writer = csv.DictWriter(out, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return out.getvalue()


def json_text(
    rows: Sequence[SweepRow],
    conditions: Mapping[str, str],
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    """Rows and conditions as a JSON document.

    An infinite PSNR (identical images) is the string `"inf"`, since JSON has no infinity.

    Raises:
        ValueError: a number is NaN.
    """
    document = {
        "schema": SCHEMA,
        "conditions": dict(conditions),
        "notes": list(notes),
        "rows": [_finite(row.as_dict()) for row in rows],
        "published": [_finite(row.as_dict()) for row in published],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _formatted(
    table: TextTable, escape: Callable[[str], str], bold: str
) -> tuple[list[str], list[list[str] | None]]:
    """Header and body with escaped text and bold cells; `bold` holds `{}` for a cell's text."""
    body = [
        line
        and [
            bold.replace("{}", escape(text)) if (i, j) in table.bold else escape(text)
            for j, text in enumerate(line)
        ]
        for i, line in enumerate(table.body)
    ]
    return [escape(text) for text in table.header], body


def _markdown_table(table: TextTable) -> str:
    header, body = _formatted(table, _markdown_escape, "**{}**")
    text: str = tabulate(
        [line or [""] * len(header) for line in body],
        header,
        "pipe",
        disable_numparse=True,
        colalign=("left", *["right"] * (len(header) - 1)),
    )
    return text


def _markdown_escape(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    on_one_line = " ".join(text.split())
    # An underscore inside a word is not markup, and names are easier to read without a backslash.
    return re.sub(r"[\\`*<>#|\[\]~$&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", on_one_line)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "Δ": r"$\Delta$",
    "∞": r"$\infty$",
    "*": "$^{*}$",
    "³": "$^{3}$",
    "²": "$^{2}$",
}


def _latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_table(table: TextTable, sentences: Sequence[str]) -> str:
    header, body = _formatted(table, _latex_escape, r"\textbf{{}}")
    lines = [r"    \midrule" if line is None else f"    {' & '.join(line)} \\\\" for line in body]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex_escape(' '.join([f'{table.title}.', *sentences]))}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"    \toprule",
            f"    {' & '.join(header)} \\\\",
            r"    \midrule",
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == math.inf else value for key, value in values.items()}
