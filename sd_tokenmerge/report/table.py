"""Tables of a sweep as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields

from sd_tokenmerge.report.cells import TextTable, listing, pivots
from sd_tokenmerge.report.rows import Conditions, SweepRow

SCHEMA = 1
"""Version of the JSON document's layout."""


def markdown(
    rows: Sequence[SweepRow],
    conditions: Conditions,
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    """Tables of methods by keep rates, then every measurement, then the conditions.

    Args:
        rows: what was measured; comparable with one another.
        conditions: printed below the tables.
        published: rows to show below the measured ones of the same table.
        notes: sentences to print below the tables.

    Returns:
        A Markdown document whose columns are aligned in plain text too.

    Raises:
        ValueError: the rows are not comparable, or there are none.
    """
    tables = [*pivots(rows, published), listing(rows)]
    parts = [f"### {table.title}\n\n{_markdown_table(table)}" for table in tables]
    sentences = dict.fromkeys([note for table in tables for note in table.notes] + [*notes])
    if sentences:
        parts.append("\n".join(f"- {_markdown_escape(sentence)}" for sentence in sentences))
    parts.append(f"Conditions: {conditions.line()}")
    return "\n\n".join(parts) + "\n"


def latex(
    rows: Sequence[SweepRow],
    conditions: Conditions,
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    r"""The table of distances by methods and keep rates, for `\usepackage{booktabs}`.

    Args:
        rows: what was measured; comparable with one another.
        conditions: part of the caption.
        published: rows to show below the measured ones.
        notes: sentences for the caption.

    Returns:
        A `table` environment for each of Markdown's tables but the long one.

    Raises:
        ValueError: the rows are not comparable, or there are none.
    """
    parts = [
        _latex_table(table, [*table.notes, *notes, f"Conditions: {conditions.line()}"])
        for table in pivots(rows, published)
    ]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(parts)


def csv_text(rows: Sequence[SweepRow]) -> str:
    """One line per row with every field at full precision; empty where not measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row.as_dict())
    return out.getvalue()


def json_text(
    rows: Sequence[SweepRow],
    conditions: Conditions,
    *,
    published: Sequence[SweepRow] = (),
    notes: Sequence[str] = (),
) -> str:
    """Rows and conditions as a JSON document that `rows_from_json` reads back.

    An infinite PSNR (identical images) is the string `"inf"`, since JSON has no infinity.
    """
    document = {
        "schema": SCHEMA,
        "conditions": asdict(conditions),
        "notes": list(notes),
        "rows": [_finite(row.as_dict()) for row in rows],
        "published": [_finite(row.as_dict()) for row in published],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rows_from_json(text: str) -> tuple[list[SweepRow], Conditions]:
    """Read the measured rows and the conditions of `json_text`.

    Raises:
        ValueError: not such a document.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"`text` must be a sweep's JSON document of schema {SCHEMA}.")
    rows = [
        SweepRow.from_dict({k: math.inf if v == "inf" else v for k, v in row.items()})
        for row in document["rows"]
    ]
    return rows, Conditions(**document["conditions"])


def _markdown_table(table: TextTable) -> str:
    lines = [[_markdown_escape(text) for text in table.header]]
    for i, row in enumerate(table.body):
        texts = [_markdown_escape(text) for text in row or [""] * len(table.header)]
        lines.append([f"**{t}**" if (i, j) in table.bold else t for j, t in enumerate(texts)])
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def _markdown_escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


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
    caption = " ".join([f"{table.title}.", *sentences])
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_latex_escape(caption)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"    \toprule",
        "    " + " & ".join(map(_latex_escape, table.header)) + r" \\",
        r"    \midrule",
    ]
    for i, row in enumerate(table.body):
        if row is None:
            lines.append(r"    \midrule")
            continue
        cells = [_latex_escape(text) for text in row]
        cells = [rf"\textbf{{{t}}}" if (i, j) in table.bold else t for j, t in enumerate(cells)]
        lines.append("    " + " & ".join(cells) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _finite(values: dict[str, object]) -> dict[str, object]:
    return {key: "inf" if value == math.inf else value for key, value in values.items()}
