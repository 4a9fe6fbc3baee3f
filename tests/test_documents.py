"""The documents' Python code runs, page by page, with the sample pipeline in place of any other."""

from __future__ import annotations

import re
import textwrap
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sd_tokenmerge

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "samples/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
)
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.M | re.S)
NOT_RUN = "# not run by the tests: "
"""The first line of code that can't run here, followed by the reason."""


def blocks(page):
    """The page's blocks of Python with the numbers of their first lines."""
    text = (ROOT / page).read_text("utf-8")
    return [
        (text[: block.start()].count("\n") + 1, textwrap.dedent(block[2]))
        for block in BLOCK.finditer(text)
    ]


class SmallPipeline(StableDiffusionPipeline):
    """Generates tiny pictures in two steps, whatever the code asks for."""

    def __call__(self, *args, **kwargs):
        return super().__call__(
            *args, **kwargs | {"height": 128, "width": 128, "num_inference_steps": 2}
        )

    def to(self, device):
        """Stays where it is."""
        return self


@cache
def small_pipeline():
    pipe = SmallPipeline.from_pretrained(ROOT / "samples" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_runs(page, monkeypatch, tmp_path):
    pipe = small_pipeline()
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    # so that a block may list several calls
    again = partial(sd_tokenmerge.apply_patch, replace=True)
    monkeypatch.setattr(sd_tokenmerge, "apply_patch", again, raising=False)
    tokens = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(0))
    names = {name: getattr(sd_tokenmerge, name) for name in sd_tokenmerge.__all__}
    names |= {"__name__": __name__, "pipe": pipe, "tokens": tokens, "x": tokens}
    try:
        for line, code in blocks(page):
            if not code.startswith(NOT_RUN):
                compiled = compile("\n" * line + code, ROOT / page, "exec", dont_inherit=True)
                exec(compiled, names)
    finally:
        with suppress(RuntimeError):
            sd_tokenmerge.remove_patch(pipe)


def test_there_is_code():
    with_code = {page for page in PAGES if blocks(page)}
    assert {"README.md", "docs/index.md", "docs/methods/index.md"} <= with_code
