"""Captions of plots and pictures: conditions in lines that a reader can follow."""

from __future__ import annotations

from collections.abc import Callable


def fold(caption: str, is_too_long: Callable[[str], bool]) -> list[str]:
    """Break a caption into lines, but not before the last word of a condition, its value.

    Args:
        caption: such as `Conditions.line`: conditions divided by "; ".
        is_too_long: whether a line does not fit; what must not be broken is a line nevertheless.
    """
    pieces: list[str] = []
    words = caption.split()
    for number, word in enumerate(words, start=1):
        is_value = word.endswith(";") or number == len(words)
        if is_value and pieces and not pieces[-1].endswith(";"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines: list[str] = []
    for piece in pieces:
        if lines and not is_too_long(longer := f"{lines[-1]} {piece}"):
            lines[-1] = longer
        else:
            lines.append(piece)
    return lines
