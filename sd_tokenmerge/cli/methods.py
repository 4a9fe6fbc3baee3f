"""`sd-tokenmerge methods`: what exists, with options, reach and source."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sd_tokenmerge.methods import Method

_GRID_SIDE = 64
"""Grid on which the reach is stated: that of SD 1.5 at 512 px and of SDXL at 1024 px."""


def methods_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merging methods: options, lowest keep rate, paper.

    Options are written after a colon, as in "tome-sd:stride=4,random=true". The lowest keep rate is
    that on 64 x 64 tokens.
    """
    from sd_tokenmerge.methods import METHODS

    described = [_describe(cls) for cls in METHODS.values()]
    if as_json:
        print(json.dumps(described, indent=2))
    else:
        print("\n\n".join(_paragraph(method) for method in described))


def _describe(cls: type[Method]) -> dict[str, Any]:
    """One method, from its class and the docstring of its module."""
    import sys
    from dataclasses import fields
    from inspect import getdoc

    from sd_tokenmerge.methods.base import Grid, describe_type, option_types

    types = option_types(cls)
    method = cls()
    grid = Grid(_GRID_SIDE, _GRID_SIDE)
    defaults = {field.name: field.default for field in fields(method)}  # type: ignore[arg-type]
    return {
        "name": cls.name,
        "summary": (getdoc(cls) or "").splitlines()[0],
        "source": (getdoc(sys.modules[cls.__module__]) or "").splitlines()[0],
        "options": [
            {"name": name, "values": describe_type(hint), "default": defaults[name]}
            for name, hint in types.items()
        ],
        "lowest_keep_rate": method.smallest_num_clusters(grid) / grid.num_tokens,
        "uses_seed": method.uses_seed,
        "uses_scores": method.uses_scores,
    }


def _paragraph(method: dict[str, Any]) -> str:
    lines = [f"{method['name']}: {method['summary']}", f"  source: {method['source']}"]
    for option in method["options"]:
        default = option["default"]
        spelled = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {option['name']}={option['values']} (default: {spelled})")
    lowest = method["lowest_keep_rate"]
    reach = "any" if lowest <= 1 / _GRID_SIDE**2 else f"at least {lowest:g}"
    random = "random, drawn from the merge seed" if method["uses_seed"] else "deterministic"
    lines.append(f"  keep rate: {reach}; {random}")
    return "\n".join(lines)
