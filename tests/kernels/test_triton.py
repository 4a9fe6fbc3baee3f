"""The Triton kernels: run by Triton's interpreter, and compiled for real GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


@pytest.mark.timeout(600)
def test_kernels_under_the_interpreter():
    """In a process of its own: the interpreter is chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(INTERPRETED)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sd_tokenmerge.kernels.triton_segments import sum_segments

types = dict(tokens="*fp16", order="*i64", first="*i64", sums="*fp32", C="i32")
constants = dict(DTYPE=triton.language.float32, BLOCK_C=128)
signature = {
    name: "constexpr" if name in constants else types[name] for name in sum_segments.arg_names
}
source = ASTSource(sum_segments, signature, constants)
built = triton.compile(
    source,
    target=GPUTarget("cuda", int(sys.argv[1]), 32),
    options=dict(enable_fp_fusion=False),
)
print(len(built.asm["cubin"]))
assert built.metadata.shared <= 96 * 1024
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernel_compiles_to_machine_code(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, capability], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
