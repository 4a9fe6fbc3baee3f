"""`sd-tokenmerge methods`: the methods with their options, lowest keep rates and sources."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sd_tokenmerge.methods import Method

_GRID_SIDE = 64
"""Grid of the stated lowest keep rates: that of SD 1.5 at 512 px and of SDXL at 1024 px."""

_MAX_WIDTH = 100


def methods_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merging methods: paper, options, lowest keep rate.

    Options are written after a colon, as in "tome-sd:stride=4,random=true". Lowest keep rates are
    those on 64 x 64 tokens.
    """
    from sd_tokenmerge.methods import METHODS

    described = [_describe(cls) for cls in METHODS.values()]
    if as_json:
        print(json.dumps(described, indent=2))
    else:
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
        print("\n\n".join(_paragraph(method, width) for method in described))


def _describe(cls: type[Method]) -> dict[str, Any]:
    """One method, from its class and the docstring of its module."""
    import sys
    from dataclasses import fields

    from sd_tokenmerge.methods.base import Grid
    from sd_tokenmerge.options import describe_type, option_types

    types, meanings = option_types(cls), _meanings(cls)
    method = cls()
    grid = Grid(_GRID_SIDE, _GRID_SIDE)
    defaults = {field.name: field.default for field in fields(method)}  # type: ignore[arg-type]
    return {
        "name": cls.name,
        "summary": (inspect.getdoc(cls) or "").splitlines()[0],
        "source": (inspect.getdoc(sys.modules[cls.__module__]) or "").splitlines()[0],
        "options": [
            {
                "name": name,
                "values": describe_type(hint),
                "default": defaults[name],
                "meaning": meanings[name],
            }
            for name, hint in types.items()
        ],
        "lowest_keep_rate": method.smallest_num_clusters(grid) / grid.num_tokens,
        "uses_seed": method.uses_seed,
        "uses_scores": method.uses_scores,
    }


def _meanings(cls: type[Method]) -> dict[str, str]:
    """The description of each option in the class's docstring."""
    _, _, section = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}


def _paragraph(method: dict[str, Any], width: int) -> str:
    head = f"{method['name']}: {method['summary']}"
    lines = textwrap.wrap(head, width, subsequent_indent="  ")
    lines += _indented(f"source: {method['source']}", "  ", width)
    for option in method["options"]:
        default = option["default"]
        spelled = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {option['name']}={option['values']} (default: {spelled})")
        lines += _indented(option["meaning"], "      ", width)
    lowest = method["lowest_keep_rate"]
    reach = "any" if lowest <= 1 / _GRID_SIDE**2 else f"at least {lowest:g}"
    random = "random, drawn from the merge seed" if method["uses_seed"] else "deterministic"
    lines.append(f"  keep rate: {reach}; {random}")
    return "\n".join(lines)


def _indented(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
