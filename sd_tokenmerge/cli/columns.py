"""Rows of text as columns on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tabulate import tabulate

from sd_tokenmerge.report.captions import printable


def in_columns(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Align rows, with two spaces between columns.

    Args:
        rows: header and body, all of the same length.
        left: columns that are aligned to the left; the others hold numbers.
    """
    align = ["left" if column in left else "right" for column in range(len(rows[0]))]
    cells = [[printable(text) for text in row] for row in rows]
    text = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join(line.rstrip() for line in text.split("\n"))
