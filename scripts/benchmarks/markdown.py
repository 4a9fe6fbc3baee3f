"""Markdown tables of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """Device, threads and versions of the first row, and the commits of all."""
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    is_gpu = first["device"].startswith("NVIDIA")
    threads = "" if is_gpu else f", {counted(first['threads'], 'thread')}"
    return f"{first['device']}{threads}, torch {first['torch']}, commit {commits}."


def counted(count: str | int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is one."""
    return f"{count} {noun}" if str(count) == "1" else f"{count} {noun}s"


def number(text: str, digits: int) -> str:
    """A number with so many decimals, or a dash for an empty cell."""
    return f"{float(text):.{digits}f}" if text else "-"


def plus_minus(row: Row, value: str, error: str, digits: int) -> str:
    """Value and standard error, where there is one."""
    known = f" ± {number(row[error], digits)}" if row[error] else ""
    return number(row[value], digits) + known


def spread(row: Row, prefix: str) -> str:
    """Median and percentiles, from the columns `PREFIX`, `PREFIX_20` and `PREFIX_80`."""
    return f"{row[prefix]} ({row[f'{prefix}_20']} to {row[f'{prefix}_80']})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
