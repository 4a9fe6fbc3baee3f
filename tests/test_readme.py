"""The documents' Python code runs as written, with a tiny pipeline in place of a trained one."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sd_tokenmerge
from tests.tiny_models import tiny_sd15

ROOT = Path(__file__).parents[1]
CODES = [
    (page, code)
    for page in ("README.md", "docs/migrating.md")
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
]


@pytest.mark.parametrize(("page", "code"), CODES)
def test_code_runs(page, code, monkeypatch, tmp_path):
    pipe = tiny_sd15()
    pipe.to = lambda device: pipe
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    tokens = torch.randn(2, 4096, 8, generator=torch.Generator().manual_seed(0))
    public = {name: getattr(sd_tokenmerge, name) for name in sd_tokenmerge.__all__}
    again = partial(sd_tokenmerge.apply_patch, replace=True)
    exec(code, {**public, "apply_patch": again, "pipe": pipe, "tokens": tokens, "x": tokens})


def test_there_is_code():
    assert Counter(page for page, _ in CODES) == {"README.md": 3, "docs/migrating.md": 4}
