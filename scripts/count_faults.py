"""Run the fault tests in full and count: kills survived, damages found, images lost.

python scripts/count_faults.py --store              about ten minutes on two cores
python scripts/count_faults.py --reports F --minutes 3   as many tests as fit; again to go on
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from measured import Row, describe, publish

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "`generate`": "tests/sampling/test_faults.py",
    "`sweep`": "tests/sweep/test_faults.py",
}
COUNTS = ("kills survived", "damages found and repaired", "images lost")
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "--timeout=600"),
    *("-o", "junit_family=xunit1"),  # the default one has no place for what tests record
]


def main() -> None:
    """Run, count, print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reports", type=Path, help="where results are kept between two starts")
    parser.add_argument("--minutes", type=float, help="stop beginning tests after so long")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    arguments = parser.parse_args()
    limit = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        reports = arguments.reports or Path(scratch)
        reports.mkdir(parents=True, exist_ok=True)
        rows = [count(name, path, reports, limit) for name, path in SUITES.items()]
    document = describe(rows, "python scripts/count_faults.py")
    publish("faults", document, store=arguments.store)


def count(name: str, path: str, reports: Path, limit: float | None) -> Row:
    """Run the tests of one suite that have no report yet, and add up what all recorded.

    Raises:
        SystemExit: a test failed, or there was no time for all.
    """
    counts: Counter[str] = Counter()
    for test in collect(path):
        report = reports / f"{test.replace('/', '.').replace('::', '.')}.xml"
        if not report.exists():
            if limit is not None and time.monotonic() > limit:
                sys.exit("There are tests left; run the same command again.")
            run(test, report)
        for case in ElementTree.parse(report).iter("testcase"):
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
            for entry in case.iter("property"):
                counts[entry.attrib["name"]] += int(entry.attrib["value"])
    return {
        "command": name,
        "fault tests passed": counts["passed"],
        "skipped": counts["skipped"],
        **{kind: counts[kind] for kind in COUNTS},
    }


def collect(path: str) -> list[str]:
    """The ids of all tests in a file."""
    listing = subprocess.run(
        [*PYTEST, "--collect-only", path], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    return [line for line in listing.splitlines() if "::" in line]


def run(test: str, report: Path) -> None:
    """Run one test; its report appears only if it passed.

    Raises:
        SystemExit: it failed.
    """
    partial = report.with_suffix(".partial")
    print(test, file=sys.stderr, flush=True)
    if subprocess.run([*PYTEST, test, f"--junitxml={partial}"], cwd=ROOT, stdout=2).returncode:
        sys.exit(f"{test} failed.")
    partial.rename(report)


if __name__ == "__main__":
    main()
