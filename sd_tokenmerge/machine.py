"""The processor, and the cores that this process may use. Imports no torch."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Processors that this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_model() -> str:
    """The processor's model."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_name() -> str:
    """The processor's model, and the number of cores that this process may use."""
    cores = usable_cores()
    return f"{processor_model()} ({cores} core{'' if cores == 1 else 's'})"
