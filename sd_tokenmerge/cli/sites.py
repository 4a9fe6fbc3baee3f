"""`sd-tokenmerge sites`: which self-attentions of a model would be merged, and how much."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.sampling.options import DEFAULT_KEEP_RATE, DEFAULT_METHOD

if TYPE_CHECKING:
    from sd_tokenmerge.patching.outline import PlannedSite


def sites_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder or hub id; only configurations are read. Default: the sample "
            "pipeline of the checkout."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="A method string; see `sd-tokenmerge methods`.")
    ] = DEFAULT_METHOD,
    keep_rate: Annotated[
        str,
        typer.Option(
            help="Fraction of tokens kept, in (0, 1], or one that differs by block or level, as in "
            "`generate`."
        ),
    ] = f"{DEFAULT_KEEP_RATE:g}",
    levels: Annotated[
        int | None,
        typer.Option(
            help="How many of the finest resolutions with self-attention are merged; default: 1."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Height and width in pixels; default: what the model was made for."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Instead of --size.")] = None,
    width: Annotated[int | None, typer.Option(help="Instead of --size.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Never ask the hub.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what would be merged where: blocks, grids, tokens before and after.

    Needs no weights: the UNet is built from its configuration alone. With --json also heads and
    channels.
    """
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.config import make_config
    from sd_tokenmerge.patching.outline import load_outline, plan_sites
    from sd_tokenmerge.sampling.resolve import default_model, read_sample_settings

    with user_errors():
        if size is not None and (height is not None or width is not None):
            raise ValueError("--size excludes --height and --width, got both.")
        model = default_model() if model is None else model
        own = read_sample_settings(model).get("size")
        outline = load_outline(model, revision=revision, local_files_only=local_files_only)
        sites = plan_sites(
            outline,
            make_config(method, keep_rate=keep_rate, levels=levels),
            height=height or size or own,
            width=width or size or own,
        )
    if as_json:
        print(json.dumps([_as_dict(site) for site in sites], indent=2))
    else:
        print(f"{_summary(sites, method, keep_rate)}\n\n{_table(sites)}")


def _as_dict(site: PlannedSite) -> dict[str, object]:
    grid = {"height": site.grid.height, "width": site.grid.width}
    return vars(site) | {"grid": grid}


def _summary(sites: list[PlannedSite], method: str, keep_rate: str) -> str:
    merged = [site for site in sites if site.merged]
    changes = dict.fromkeys(f"{s.tokens_before:,} -> {s.tokens_after:,} tokens" for s in merged)
    return (
        f"{len(merged)} of {len(sites)} self-attentions are merged by {method} at keep rate "
        f"{keep_rate}: {', '.join(changes)}."
    )


def _table(sites: list[PlannedSite]) -> str:
    rows = [["block", "level", "grid", "tokens", "after"]]
    for site in sites:
        grid = f"{site.grid.height}x{site.grid.width}"
        after = f"{site.tokens_after:,}" if site.merged else "-"
        rows.append([site.block, str(site.level), grid, f"{site.tokens_before:,}", after])
    return in_columns(rows)
