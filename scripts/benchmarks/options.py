"""Command-line options that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.cases import CASES, QUICK
from benchmarks.contestants import CONTESTANTS
from benchmarks.rows import STORE
from benchmarks.unet_calls import UNetCalls


def add_common_options(parser: argparse.ArgumentParser, minutes: float | None = None) -> None:
    """Device, threads, time, folder of the rows, `--quick`.

    Args:
        parser: of a subcommand.
        minutes: default of `--minutes`; None for a benchmark without a time limit.
    """
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    if minutes is not None:
        parser.add_argument(
            "--minutes",
            type=float,
            default=minutes,
            help="time for the turns of all cases together",
        )
        parser.add_argument("--rounds", type=int, default=60, help="maximum turns of each")
    parser.add_argument("--out", type=Path, default=STORE, help="folder of the rows")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; rows are not stored")


def add_unet_options(
    parser: argparse.ArgumentParser, cases: Sequence[str], contestants: Sequence[str]
) -> None:
    """Cases and contestants (with these defaults), batch size and precision."""
    known = [case for case in CASES if case != QUICK]
    parser.add_argument("--cases", nargs="+", choices=known, default=list(cases))
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=list(contestants)
    )
    parser.add_argument("--batch", type=int, default=2, help="2: the two branches of guidance")
    parser.add_argument("--dtype", help="default: float16 on a GPU, float32 on a CPU")


def apply_common_options(arguments: argparse.Namespace) -> None:
    """Set the number of threads, and the defaults that `--quick` and the device imply."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick and hasattr(arguments, "minutes"):
        arguments.minutes, arguments.rounds = 0.0, 1
    if arguments.quick and hasattr(arguments, "cases"):
        arguments.cases = [QUICK]
    if hasattr(arguments, "dtype"):
        on_cpu = arguments.device == "cpu"
        arguments.dtype = arguments.dtype or ("float32" if on_cpu else "float16")


def build(case: str, arguments: argparse.Namespace) -> UNetCalls:
    """The UNet of a case with the chosen batch size, device and precision."""
    options = {"device": arguments.device, "dtype": arguments.dtype}
    return cases.build(case, batch=arguments.batch, **options)
