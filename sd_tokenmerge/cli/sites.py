"""`sd-tokenmerge sites`: the self-attentions of a model, and how many tokens each keeps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.cli.field_options import with_options
from sd_tokenmerge.cli.generate import AsJson, Preset, Size, read_merging, read_size
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.keep_rates import format_keep_rates
from sd_tokenmerge.sampling.options import GenerateOptions

if TYPE_CHECKING:
    from sd_tokenmerge.patching.outline import PlannedSite

_OPTIONS = (
    *("height", "width", "model", "model_config", "revision", "local_files_only"),
    *("method", "keep_rate", "levels"),
)


@with_options(GenerateOptions, MergeConfig, only=_OPTIONS)
def sites_command(
    *, size: Size = None, preset: Preset = None, as_json: AsJson = False, **values: Any
) -> None:
    """Show where tokens would be merged: blocks, grids, tokens before and after.

    Needs no weights: the model is built from its configuration alone. --json adds heads and
    channels.
    """
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.patching.outline import plan_sites
    from sd_tokenmerge.sampling.call_defaults import call_defaults
    from sd_tokenmerge.sampling.load import load_model_outline
    from sd_tokenmerge.sampling.resolve import default_model, read_sample_settings

    config = read_merging(values | {"preset": preset})
    with user_errors():
        model = default_model() if values["model"] is None else values["model"]
        files = {
            "revision": values["revision"],
            "local_files_only": bool(values["local_files_only"]),
        }
        sample = call_defaults(model, **files) | read_sample_settings(model)
        given = {name: values[name] for name in ("height", "width") if values[name] is not None}
        pixels = sample | given | read_size(values | {"size": size})
        outline = load_model_outline(model, model_config=values["model_config"], **files)
        sites = plan_sites(outline, config, height=pixels.get("height"), width=pixels.get("width"))
    if as_json:
        print(json.dumps([_as_dict(site) for site in sites], indent=2))
    else:
        print(f"{_summary(sites, config)}\n\n{_table(sites)}")


def _as_dict(site: PlannedSite) -> dict[str, object]:
    grid = {"height": site.grid.height, "width": site.grid.width}
    return vars(site) | {"grid": grid}


def _summary(sites: list[PlannedSite], config: MergeConfig) -> str:
    merged = [site for site in sites if site.merged]
    changes = dict.fromkeys(f"{s.tokens_before:,} -> {s.tokens_after:,} tokens" for s in merged)
    return (
        f"{len(merged)} of {len(sites)} self-attentions are merged by {config.method} at keep rate "
        f"{format_keep_rates(config.keep_rate)}: {', '.join(changes)}."  # type: ignore[arg-type]
    )


def _table(sites: list[PlannedSite]) -> str:
    rows = [["block", "level", "grid", "tokens", "after"]]
    for site in sites:
        after = f"{site.tokens_after:,}" if site.merged else "-"
        rows.append([site.block, str(site.level), str(site.grid), f"{site.tokens_before:,}", after])
    return in_columns(rows)
