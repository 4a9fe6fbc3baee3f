"""Run the fault tests in full and count: kills survived, damages found, images lost.

python scripts/count_faults.py --store       about ten minutes on two cores
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from measured import Row, describe, publish, this_command

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "`generate`": "tests/sampling/test_faults.py",
    "`sweep`": "tests/sweep/test_faults.py",
}
COUNTS = ("kills survived", "damages found and repaired", "images lost")


def main() -> None:
    """Run, count, print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    store = parser.parse_args().store
    rows = [count(name, ROOT / path) for name, path in SUITES.items()]
    publish("faults", describe(rows, this_command()), store=store)


def count(name: str, path: Path) -> Row:
    """Run one suite and add up what its tests recorded.

    Raises:
        SystemExit: a test failed, so that there is nothing to be published.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        slow_too = ["-m", "slow or not slow"]
        if pytest.main([str(path), *slow_too, "--rootdir", str(ROOT), f"--junitxml={report}"]):
            sys.exit(f"{path.name}: a test failed.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    counts: Counter[str] = Counter()
    for case in cases:
        for entry in case.iter("property"):
            counts[entry.attrib["name"]] += int(entry.attrib["value"])
    return {
        "command": name,
        "fault tests passed": len(cases) - len(skipped),
        "skipped": len(skipped),
        **{kind: counts[kind] for kind in COUNTS},
    }


if __name__ == "__main__":
    main()
