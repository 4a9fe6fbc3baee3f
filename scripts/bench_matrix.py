"""Step times of every method, in each form and at each keep rate, on a real architecture.

    python scripts/bench_matrix.py --minutes 20                  # SD 1.5 at 512 px
    python scripts/bench_matrix.py --methods atc tome-sd --keep 50
    python scripts/bench_matrix.py --quick                       # a tiny model: does it run?

A cell is METHOD/FORM/PERCENT, for example `atc:linkage=single/exact/50`. Methods are all of
`METHODS` with their defaults, and once with each other value of each option that is a choice, and
`oracle`, which merges by labels that are there before. Forms are presets, with another method and
keep rate: `exact`, the papers', and `balanced`, keys and values merged by partitions that are kept
(`fast` is the same form). What a method cannot do becomes a row with the reason.

Cells take turns, in another order in every round. A form that keeps partitions for n steps is
called with a new partition and with a kept one, and its step time is that of the first plus n - 1
times the second, over n. A call of the unpatched UNet is timed before and after every three cells,
and step times are relative to the mean of these two.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bench_rows import MACHINE_FIELDS, append_rows, describe_machine
from pipeline_contestants import Contestant, oracle
from timed_unet import CASES, QUICK, TimedUNet, add_model_arguments, build_unet, milliseconds
from turns import Timings, take_turns
from unet_gate import require_sound

from sd_tokenmerge import METHODS, PRESETS, Method
from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.methods.base import option_types

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "case", "method", "form", "keep", "dtype", "batch", "refresh_every"),
    *("repeats", "fresh_ms", "kept_ms", "unpatched_ms", "relative", "relative_low"),
    *("relative_high", "refused"),
    *MACHINE_FIELDS,
)
ORACLE = "oracle"
FORMS = ("exact", "balanced")
KEEP = (50, 25, 10)


def method_strings() -> list[str]:
    """Every method with its defaults, and once with each other choice of each option."""
    return [str(method) for cls in METHODS.values() for method in (cls(), *_variants(cls))]


def _variants(cls: type[Method]) -> Iterator[Method]:
    for option, hint in option_types(cls).items():
        choices: tuple[Any, ...] = (False, True) if hint is bool else ()
        if get_origin(hint) is Literal:
            choices = get_args(hint)
        for choice in choices:
            if choice != getattr(cls(), option):
                yield cls(**{option: choice})


@dataclass(frozen=True)
class Cell:
    """A method in a form at a keep rate.

    Attributes:
        method: its string, or `ORACLE`.
        form: a preset's name.
        keep: percentage of the tokens that is kept.
    """

    method: str
    form: str
    keep: int

    @property
    def contestant(self) -> Contestant:
        """How the UNet is patched."""
        if self.method == ORACLE:
            return oracle(PRESETS[self.form].merge, self.keep / 100)
        options = {"method": self.method, "preset": self.form, "keep_rate": self.keep / 100}
        return Contestant(f"{self.method}/{self.form}/{self.keep}", options)

    def refusal(self, calls: TimedUNet) -> str:
        """Why this cannot be done; empty where it can."""
        try:
            with self.contestant.on(calls.unet):
                return ""
        except ValueError as error:
            return str(error)


class Matrix:
    """All cells on one UNet."""

    def __init__(self, calls: TimedUNet, name: str, cells: list[Cell]) -> None:
        """Note which cells the methods refuse.

        Args:
            calls: of the UNet.
            name: of the case.
            cells: to be timed.
        """
        self.calls = calls
        self.name = name
        self.refusals = {cell: cell.refusal(calls) for cell in cells}

    def check(self) -> None:
        """Refuse to time what is wrong, at each cell that keeps most.

        Raises:
            SystemExit: with what is wrong.
        """
        most = max(cell.keep for cell in self.refusals)
        checked = [cell.contestant for cell in self._possible() if cell.keep == most]
        require_sound(self.calls, checked, self.name)
        print(f"{self.name}: checks passed", file=sys.stderr)

    def run(self, seconds: float, rounds: int) -> list[dict[str, object]]:
        """Take turns for so long, or so many rounds, at least one; one row for each cell."""
        contestants = [cell.contestant for cell in self._possible()]
        timings = take_turns(self.calls, contestants, seconds, rounds)
        machine = describe_machine(str(self.calls.device))
        return [
            self._row(cell, timings.get(cell.contestant.name)) | machine for cell in self.refusals
        ]

    def _possible(self) -> list[Cell]:
        return [cell for cell, refusal in self.refusals.items() if not refusal]

    def _row(self, cell: Cell, taken: Timings | None) -> dict[str, object]:
        row: dict[str, object] = {
            "benchmark": "matrix",
            "case": self.name,
            "method": cell.method,
            "form": cell.form,
            "keep": cell.keep,
            "dtype": str(self.calls.dtype).removeprefix("torch."),
            "batch": self.calls.batch,
            "refresh_every": cell.contestant.refresh_every,
            "repeats": len(taken.fresh) if taken else 0,
            "refused": self.refusals[cell],
        }
        if taken:
            relative = taken.relative()
            row["fresh_ms"] = milliseconds(statistics.median(taken.fresh))
            row["kept_ms"] = milliseconds(statistics.median(taken.kept)) if taken.kept else ""
            row["unpatched_ms"] = milliseconds(statistics.median(taken.unpatched))
            row["relative"] = f"{statistics.median(relative):.3f}"
            row["relative_low"] = f"{min(relative):.3f}"
            row["relative_high"] = f"{max(relative):.3f}"
        name = f"{cell.method}/{cell.form}/{cell.keep}"
        print(f"{self.name:10} {name:44} {row.get('relative') or self.refusals[cell]}")
        return row


def cells(methods: Sequence[str], keep: Sequence[int]) -> list[Cell]:
    """One for each method, form and keep rate."""
    return [Cell(method, form, one) for form in FORMS for one in keep for method in methods]


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [ORACLE, *method_strings()]
    parser.add_argument("--case", choices=list(CASES), default="sd15-512")
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--keep", nargs="+", type=int, default=KEEP, help="percentages")
    add_model_arguments(parser)
    parser.add_argument("--minutes", type=float, default=20.0, help="at least one round is made")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--batch", type=int, default=2, help="2: the two branches of guidance")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "matrix.csv")
    return parser.parse_args()


def main() -> None:
    """Check and time the cells."""
    arguments = parse_arguments()
    quiet_libraries()
    name = QUICK if arguments.quick else arguments.case
    matrix = Matrix(build_unet(name, arguments), name, cells(arguments.methods, arguments.keep))
    matrix.check()
    rows = matrix.run(arguments.minutes * 60, 1 if arguments.quick else arguments.rounds)
    if not arguments.quick:
        append_rows(arguments.out, FIELDS, rows)
        print(f"appended to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
