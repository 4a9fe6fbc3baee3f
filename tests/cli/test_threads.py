from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_policy_is_set_before_torch_is_loaded(set_by_user, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if set_by_user is not None:
        environment["OMP_WAIT_POLICY"] = set_by_user
    script = (
        "import os, sys\n"
        "import sd_tokenmerge.cli.commands as app\n"
        "app.run = lambda words: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "from sd_tokenmerge.cli import main\n"
        "main([])"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [expected, "False"]
