"""What pays on this machine, and what doesn't, in two sentences."""

from __future__ import annotations

from collections.abc import Sequence

from sd_tokenmerge.bench.plot import Point

FASTER = 0.98
"""Relative time from which on a recipe counts as no faster: differences are within the noise."""


def verdict(points: Sequence[Point]) -> tuple[str, str]:
    """One sentence on the recipes that pay, one on those that don't.

    A recipe pays if it is faster than the full one, and no smaller number of steps is both faster
    and closer to the full pictures.

    Args:
        points: all recipes other than the full one; those named `steps-N` take fewer steps.
    """
    fewer = [point for point in points if point.kind == "steps"]
    pay, not_pay = [], []
    for point in points:
        if point.kind == "steps":
            continue
        better = [one for one in fewer if one.time <= point.time and one.psnr >= point.psnr]
        text = f"{point.name} ({_place(point)}"
        if point.time > FASTER:
            not_pay.append(f"{text}: no faster)")
        elif better:
            best = max(better, key=lambda one: one.psnr)
            not_pay.append(f"{text}; {best.name}: {_place(best)})")
        else:
            pay.append(f"{text})")
    closest = max((one for one in fewer if one.time <= FASTER), key=lambda p: p.psnr, default=None)
    if pay:
        first = f"What pays here: {_listed(pay)}."
    elif closest is not None:
        first = (
            "No kind of merging that was tried pays here; fewer steps do, such as "
            f"{closest.name} ({_place(closest)})."
        )
    else:
        first = "Nothing that was tried pays here."
    second = f"What doesn't: {_listed(not_pay)}." if not_pay else "Everything that was tried pays."
    return first, second


def _place(point: Point) -> str:
    return f"{point.time:.2f} of the time, {point.psnr:.1f} dB"


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
