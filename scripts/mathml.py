"""A hook of MkDocs: formulas become MathML while the site is built, so pages need no script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</\1>', re.DOTALL)
"""A formula as pymdownx.arithmatex writes it."""


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula of a page; MkDocs calls this with the page's HTML.

    Raises:
        ValueError: a formula is not written as expected.
    """

    def replace(formula: re.Match[str]) -> str:
        tex = html.unescape(formula["tex"])
        if formula[1] == "span":
            return convert(tex)
        return f'<div class="formula">{convert(tex, display="block")}</div>'

    replaced = FORMULA.sub(replace, content)
    if 'class="arithmatex"' in replaced or re.search(r"<m[ion]>\\", replaced):
        raise ValueError("a page has a formula that is not understood.")
    return replaced
