"""Start a module as two processes of one group, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

Pair = list[subprocess.Popen[str]]
REPOSITORY = Path(__file__).resolve().parents[1]


def start_two(command: list[str], own: tuple[list[str], list[str]] = ([], [])) -> Pair:
    """Run `python COMMAND... OWN...` twice, with ranks 0 and 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(own)
    ]
