from __future__ import annotations

import pytest

from sd_tokenmerge.report.captions import fold

CAPTION = "Same seed in all; size 256x256; steps 25; device cpu AMD EPYC (1 core)."


@pytest.mark.parametrize("width", range(1, 80))
def test_names_and_values_stay_together(width: int) -> None:
    lines = fold(CAPTION, lambda line: len(line) > width)
    assert " ".join(lines) == CAPTION
    for line in lines:
        assert len(line) <= max(width, len("size 256x256;"))
    for pair in ("size 256x256;", "steps 25;", "(1 core)."):
        assert any(pair in line for line in lines)


def test_no_caption_is_no_line() -> None:
    assert fold("", lambda line: True) == []
