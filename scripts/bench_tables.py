"""What the tables of benchmarks have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Row = dict[str, str]
NOT_RUN = "Not run."


def latest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[name] for name in key)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows by key, in the order in which keys first came."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return list(groups.items())


def conditions_of(rows: Sequence[Row]) -> str:
    """As `conditions`, of rows that may be of several commits."""
    return conditions(rows[0] | {"commit": ", ".join(dict.fromkeys(row["commit"] for row in rows))})


def conditions(row: Row) -> str:
    """Device, threads, versions and commit of a row."""
    is_gpu = row["device"].startswith("NVIDIA")
    threads = "" if is_gpu else f", {counted(row['threads'], 'thread')}"
    return f"{row['device']}{threads}, torch {row['torch']}, commit {row['commit']}."


def counted(count: str | int, noun: str) -> str:
    """So many of something."""
    return f"{count} {noun}" if str(count) == "1" else f"{count} {noun}s"


def number(text: str, digits: int) -> str:
    """A cell's number, or a dash."""
    return f"{float(text):.{digits}f}" if text else "-"


def plus_minus(row: Row, value: str, error: str, digits: int) -> str:
    """Value and standard error."""
    known = f" ± {number(row[error], digits)}" if row[error] else ""
    return number(row[value], digits) + known


def table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table; its last columns, so many, hold numbers."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
