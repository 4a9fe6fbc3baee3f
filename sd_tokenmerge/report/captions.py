"""Names and captions in tables, plots and pictures: printable, and broken into lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def fold(caption: str, is_too_long: Callable[[str], bool]) -> list[str]:
    """Break a caption into lines; the last two words before a semicolon stay together.

    Args:
        caption: such as `conditions_sentence`: names and values, separated by "; ".
        is_too_long: whether a line does not fit. A part that cannot be broken becomes a line of
            its own even if it does not fit.
    """
    lines: list[str] = []
    for part in re.findall(r"[^\s;]+ [^\s;]+(?:;|$)|\S+", " ".join(caption.split())):
        if lines and not is_too_long(longer := f"{lines[-1]} {part}"):
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def printable(text: str) -> str:
    """Text with "?" in place of control characters, which would control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def short_name(model: str) -> str:
    """A model's name; of an absolute path, which differs by machine, the last two parts."""
    path = Path(model)
    return printable("/".join(path.parts[-2:]) if path.is_absolute() else model)
