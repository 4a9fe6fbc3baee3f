"""How OpenMP's threads wait for each other."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Make waiting threads sleep instead of spin; a policy set in the environment stays.

    Call it before importing torch. A small model has thousands of short parallel loops, each of
    which ends by waiting for the slowest thread. A spinning thread takes the core that this thread
    needs when other processes are busy.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
