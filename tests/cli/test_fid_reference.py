from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sd_tokenmerge.cli.commands import run
from tests.fid.pictures import write_validation_set


def test_the_set_is_made_and_then_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, out = tmp_path / "val", tmp_path / "out"
    write_validation_set(val)
    for end in (f"from {val}", "verified, was there already"):
        assert run(["reference", str(val), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: 5000 images of 1000 classes, {end}\n"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reference", str(tmp_path / "gone"), "--out", str(tmp_path / "out")]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("error: `source` must be an existing folder")
    assert error.count("\n") == 1


def test_no_torch_is_needed() -> None:
    program = "import sys, sd_tokenmerge.fid.reference; sys.exit('torch' in sys.modules)"
    repository = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=repository).returncode == 0
