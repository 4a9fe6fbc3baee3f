"""The code at the top of README.md and samples/README.md prints no warnings that are ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

NOT_OURS = (
    # diffusers annotates the pipeline's autoencoder as `AutoencoderKL`, although it takes others.
    "Expected types for vae: ",
    # diffusers imports these names from transformers, which expects torchvision behind them.
    "[transformers] `CLIPImageProcessor` requires torchvision",
    "[transformers] `SiglipImageProcessor` requires torchvision",
)
"""How the warnings start that the code and the sample pipeline's files can't avoid."""


def first_code(document: str, changes: dict[str, str]) -> str:
    """The first block of Python in a document, with some of its text replaced."""
    text = (ROOT / document).read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def test_no_warnings(tmp_path):
    sample = first_code(
        "samples/README.md",
        {"samples/pipeline": f"{ROOT}/samples/pipeline", "steps=25": "steps=2"},
    )
    readme = first_code(
        "README.md",
        {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": f"{ROOT}/samples/pipeline",
            "cuda": "cpu",
            'magpie.")': 'magpie.", num_inference_steps=2)',
        },
    )
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", sample + readme],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    progress = re.compile(r"\d+%\|")
    lines = [line.strip() for line in result.stderr.replace("\x1b[A", "").splitlines()]
    printed = [line for line in lines if line and not progress.search(line)]
    assert [line for line in printed if not line.startswith(NOT_OURS)] == []
    assert "3 of 7 self-attention blocks merged" in result.stdout
