"""This checkout side by side with another commit, in one run on one machine.

Each version runs in a process of its own (`worker`), the other one in a temporary git worktree. The
two take turns, and each turn of this version is compared with the turns of the other before and
after it. Rows of both versions go to `against.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.markdown import NOT_RUN, Row, counted, grouped, latest, spread, table
from benchmarks.rows import MACHINE, ROOT, append_rows, describe_commit, describe_machine, read_rows
from sd_tokenmerge.bench.turns import Cost, percentile, spread_columns, take_turns

COLUMNS = (
    *("benchmark", "case", "contestant", "against", "repeats", "ms", "ms_20", "ms_80", "cpu_ms"),
    *("relative", "relative_20", "relative_80", "relative_cpu", "same_labels"),
    *MACHINE,
)
ROUNDS = 60


@dataclass(frozen=True)
class Case:
    """The work that both versions do.

    Attributes:
        benchmark: a key of `worker.PREPARE`.
        case: name of the tokens or the UNet; the worker gets it, or `detail["case"]`.
        contestant: a method string, or a preset as `"preset-NAME"`.
        detail: further arguments of the worker's function.
    """

    benchmark: str
    case: str
    contestant: str
    detail: dict[str, Any]

    def request(self) -> dict[str, Any]:
        """The case as the worker's request."""
        arguments = {"name": self.contestant, "case": self.case, **self.detail}
        return {"do": "prepare", "benchmark": self.benchmark, **arguments}


class Worker:
    """A process that runs one version."""

    def __init__(self, tree: Path, threads: int) -> None:
        """Start it in that version's checkout."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "scripts")]),
            "OMP_NUM_THREADS": str(threads),
            "TRANSFORMERS_VERBOSITY": "error",
            "DIFFUSERS_VERBOSITY": "error",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            SystemExit: the process ended instead; it printed its error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a worker ended unexpectedly; see its error above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> Cost:
        """Cost of one run of the prepared case."""
        return Cost(**self.ask({"do": "run"}))

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def checkout(commit: str) -> Iterator[tuple[str, Path]]:
    """The abbreviated name of a commit, and its files in a temporary git worktree.

    Raises:
        SystemExit: there is no such commit.
    """
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", f"{commit}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        sys.exit(f"--against must be a commit of this repository, got {commit!r}.")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        add = [*git, "worktree", "add", "--quiet", "--detach", str(tree), commit]
        subprocess.run(add, check=True)
        try:
            yield found.stdout.strip(), tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--against`."""
    parser.add_argument("--against", metavar="COMMIT", help="compare this tree with that commit")


def run(cases: Sequence[Case], arguments: argparse.Namespace) -> str:
    """Let this tree and the commit take turns in every case; store the rows, return the table."""
    if arguments.device != "cpu":
        sys.exit(f"--against needs `--device cpu`, got {arguments.device!r}.")
    threads, here = torch.get_num_threads(), describe_commit()
    rows: list[dict[str, str]] = []
    with ExitStack() as stack:
        commit, tree = stack.enter_context(checkout(arguments.against))
        workers = [Worker(folder, threads) for folder in (ROOT, tree)]
        for worker in workers:
            stack.callback(worker.stop)
        seconds = arguments.minutes * 60 / len(cases)
        for case in cases:
            rows += measure(case, workers, (here, commit), seconds, min(arguments.rounds, ROUNDS))
            print(f"{case.benchmark} {case.case} {case.contestant}: done", file=sys.stderr)
    if not arguments.quick:
        append_rows(arguments.out / "against.csv", COLUMNS, rows)
    return comparison_table(rows)


def measure(
    case: Case, workers: Sequence[Worker], commits: tuple[str, str], seconds: float, rounds: int
) -> list[dict[str, str]]:
    """Rows of one case: the other commit's, then this tree's."""
    here, other = workers
    prepared = [worker.ask(case.request()) for worker in workers]
    same = "" if "labels" not in prepared[0] else str(prepared[0] == prepared[1])
    timings = take_turns(
        ("other", other.run),
        {"here": here.run},
        seconds=seconds,
        rounds=rounds,
        between=1,
        least=min(3, rounds),
    )
    rows = []
    for name, commit, against in (("other", commits[1], ""), ("here", *commits)):
        taken = timings[name]
        rows.append(
            {
                "benchmark": case.benchmark,
                "case": case.case,
                "contestant": case.contestant,
                "against": against,
                "repeats": str(len(taken.costs)),
                **spread_columns("ms", taken.seconds),
                "cpu_ms": spread_columns("cpu", [cost.cpu for cost in taken.costs])["cpu"],
                "relative": f"{median(taken.relative):.3f}",
                "relative_20": f"{percentile(taken.relative, 0.2):.3f}",
                "relative_80": f"{percentile(taken.relative, 0.8):.3f}",
                "relative_cpu": f"{median(taken.relative_cpu):.3f}",
                "same_labels": same,
                **describe_machine("cpu", commit),
            }
        )
    return rows


def comparisons(folder: Path) -> str:
    """The last comparison of each kind and case."""
    return comparison_table(read_rows(folder / "against.csv"))


def comparison_table(rows: Sequence[Row]) -> str:
    """One line per case, one table per benchmark, pair of commits and machine."""
    before: dict[tuple[str, ...], Row] = {}
    pairs: list[Row] = []
    for row in rows:
        key = tuple(row[name] for name in ("benchmark", "case", "contestant", "device", "threads"))
        if not row["against"]:
            before[key] = row
        else:
            pairs.append(row | {"before": spread(before[key], "ms")})
    pairs = latest(pairs, ("benchmark", "case", "contestant", "device", "threads"))
    parts = []
    for group in grouped(pairs, ("benchmark", "commit", "against", "device", "threads")):
        first = group[0]
        lines = [
            [
                row["contestant"],
                row["case"],
                row["before"],
                spread(row, "ms"),
                spread(row, "relative"),
                row["relative_cpu"],
            ]
            for row in group
        ]
        head = ["", "", f"{first['against']}, ms (20 to 80 %)", f"{first['commit']}, ms"]
        turns = [int(row["repeats"]) for row in group]
        title = (
            f"**{first['benchmark']}**; {first['device']}, {counted(first['threads'], 'thread')}, "
            f"torch {first['torch']}, {first['date'][:10]}, at least {min(turns)} turns."
        )
        labels = [row["same_labels"] for row in group if row["same_labels"]]
        if labels:
            equal = labels.count("True")
            title += f" Both chose the same partition in {equal} of {len(labels)} cases."
        parts.append(f"{title}\n\n{table([*head, 'ratio', 'ratio of CPU times'], lines)}")
    return "\n\n".join(parts) or NOT_RUN
