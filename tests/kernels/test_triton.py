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
from sd_tokenmerge.kernels import triton_segments
from sd_tokenmerge.kernels.device import triton_kernels

float64, float32, int64, int32, int8 = "*fp64", "*fp32", "*i64", "*i32", "*i8"
types = dict(
    nearest=int64, total=float64, size=float64, mean=float32, rest=float64, best=float64,
    alive=int8, is_new=int8, dormant=int8, search=int8, parent=int64, height=float64,
    own_height=float64, merged_in=int32, bound=float64, this_round="i32", rows=int64,
    row_count=int64, columns=int64, column_count=int64, error="fp32", N="i32", C="i32",
    tokens="*fp16", order=int64, first=int64, sums=float32,
)
average = dict(LOW_MAGIC=48.0, BLOCK_C=64)
kernels = [
    (triton_kernels.merge_pairs, average),
    (triton_kernels.refresh, dict(BLOCK_C=64)),
    (
        triton_kernels.find_nearest,
        dict(PRECISION="tf32x3", BLOCK_M=64, BLOCK_N=64, BLOCK_C=32),
    ),
    (triton_kernels.resolve, dict(average, BLOCK_N=16)),
    (triton_segments.sum_segments, dict(DTYPE=triton.language.float32, BLOCK_C=128)),
]
for kernel, constants in kernels:
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options=dict(enable_fp_fusion=False),
    )
    print(kernel.__name__, len(built.asm["cubin"]), built.metadata.shared)
    assert built.metadata.shared <= 96 * 1024
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_to_machine_code(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, capability], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
