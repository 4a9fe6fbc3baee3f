"""Markdown tables of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Row = dict[str, str]
NOT_RUN = "Not run."


def latest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, in the order in which keys first appear."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[name] for name in key)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Sequence[str]) -> list[list[Row]]:
    """Rows with equal keys together, in the order in which keys first appear."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return list(groups.values())


def conditions(rows: Sequence[Row]) -> str:
    """Threads and versions of the first row, and the devices and commits of all."""
    first = rows[0]
    devices, commits = " and ".join(_each(rows, "device")), ", ".join(_each(rows, "commit"))
    threads = "" if first["device"].startswith("NVIDIA") else counted(first["threads"], "thread")
    parts = [devices, threads, f"torch {first['torch']}", f"commit {commits}"]
    return f"{', '.join(filter(None, parts))}."


def _each(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def counted(count: str | int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is one."""
    return f"{count} {noun}" if str(count) == "1" else f"{count} {noun}s"


def number(text: str, digits: int) -> str:
    """A number with fixed decimals, or a dash for an empty cell."""
    return f"{float(text):.{digits}f}" if text else "-"


def plus_minus(row: Row, value: str, error: str, digits: int) -> str:
    """Value and, if there is one, standard error."""
    known = f" ± {number(row[error], digits)}" if row[error] else ""
    return number(row[value], digits) + known


def spread(row: Row, prefix: str) -> str:
    """Median and percentiles, from the columns `PREFIX`, `PREFIX_20` and `PREFIX_80`."""
    return f"{row[prefix]} ({row[f'{prefix}_20']} to {row[f'{prefix}_80']})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


MODEL = ("device", "dtype", "batch", "threads")
"""Columns in which rows of a UNet must agree, besides the case, to be compared."""


def case_tables(
    groups: Iterable[Sequence[Row]],
    head: Sequence[str],
    lines: Callable[[Sequence[Row]], Iterable[Sequence[str]]],
) -> str:
    """A table for each group of rows of one UNet case, under a title with its conditions.

    Args:
        groups: rows that are shown together.
        head: of every table.
        lines: makes the lines of a group's table.
    """
    parts = []
    for group in groups:
        title = f"**{group[0]['case']}**, {group[0]['dtype']}, batch {group[0]['batch']}; "
        parts.append(f"{title}{conditions(group)}\n\n{table(head, lines(group))}")
    return "\n\n".join(parts) or NOT_RUN
