"""What happens when a pipeline is patched; records the table that the tests compare with.

    python -m tests.conformance.outcomes            record all pipelines and processors
    python -m tests.conformance.outcomes NAME ...   record only these

Run `python scripts/render.py` afterwards: docs/pipelines.md shows the table.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from sd_tokenmerge import apply_patch
from sd_tokenmerge.config import Merge
from sd_tokenmerge.patching.sites import find_denoiser, find_sites
from tests.conformance.calls import call
from tests.conformance.components import Pipeline
from tests.conformance.discovery import attention_processors, find_class, unet_pipelines
from tests.tiny_models import call_unet, tiny_unet

TABLE = Path(__file__).with_name("outcomes.json")
"""Outcomes of `"pipelines"` and `"processors"` by name."""

WORKS, NOT_RUN = "works", "not run: "

FORMS: dict[str, dict[str, Any]] = {
    "qkv": {"merge": "qkv"},
    "qkv with proportional attention": {"merge": "qkv", "proportional_attention": True},
    **{form: {"merge": form} for form in get_args(Merge) if form != "qkv"},
}

Outcome = str | dict[str, str]
"""`"works"`, the refusal of `apply_patch`, or `"not run: WHY"`; by form where forms differ."""


def read_table() -> dict[str, dict[str, Outcome]]:
    """The recorded outcomes."""
    table: dict[str, dict[str, Outcome]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


# ---- pipelines ----------------------------------------------------------------------------------


def observe_pipeline(name: str) -> Outcome:
    """Build a pipeline, patch it in each form at all levels, and call it.

    Raises:
        AssertionError: a patched pipeline does something wrong.
        Exception: what a patched pipeline raises after `apply_patch` has accepted it.
    """
    pipe = Pipeline(name).build()
    outcomes = {form: _try_to_patch(pipe, options) for form, options in FORMS.items()}
    if WORKS in outcomes.values():
        _check_calls(pipe, [form for form, outcome in outcomes.items() if outcome == WORKS])
    return _one_if_equal(outcomes)


def _try_to_patch(model: Any, options: dict[str, Any]) -> str:
    try:
        _patch(model, **options).remove()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return WORKS


def _patch(model: Any, keep_rate: float = 0.5, **options: Any) -> Any:
    """Patch all levels, where there are any."""
    try:
        levels = {site.level for site in find_sites(find_denoiser(model))}
    except TypeError:
        levels = set()
    if levels:
        options["levels"] = len(levels)
    return apply_patch(model, "tome-sd", keep_rate=keep_rate, **options)


def _check_calls(pipe: Any, forms: list[str]) -> None:
    plain = call(pipe)
    assert plain, "a pipeline must return arrays"
    assert all(np.isfinite(array).all() for array in plain), "unpatched: not finite"
    assert _equal(call(pipe), plain), "unpatched: not repeatable"
    with _patch(pipe, keep_rate=1):
        assert _equal(call(pipe), plain), "keep rate 1: not the unpatched output"
    for form in forms:
        with _patch(pipe, **FORMS[form]) as handle:
            merged = call(pipe)
        rows = [row for row in handle.report().rows if row.merged]
        assert all(row.times_computed for row in rows), f"{form}: a block did not merge"
        assert all(np.isfinite(array).all() for array in merged), f"{form}: not finite"
        assert not _equal(merged, plain), f"{form}: the unpatched output"
    assert _equal(call(pipe), plain), "removed: not the unpatched output"


def _equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def _one_if_equal(outcomes: dict[str, str]) -> Outcome:
    distinct = set(outcomes.values())
    return distinct.pop() if len(distinct) == 1 else outcomes


# ---- attention processors -----------------------------------------------------------------------

OTHER_MODELS = NOT_RUN + "not for the self-attention of a UNet, or needs a package or a device"

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AttendExciteAttnProcessor": {"attnstore": lambda *_: None, "place_in_unet": "down"},
    "CrossFrameAttnProcessor": {"batch_size": 2},
    "CrossFrameAttnProcessor2_0": {"batch_size": 2},
    "CustomDiffusionAttnProcessor": {"train_kv": False, "train_q_out": False},
    "CustomDiffusionAttnProcessor2_0": {"train_kv": False, "train_q_out": False},
    "CustomDiffusionXFormersAttnProcessor": {"train_kv": False, "train_q_out": False},
    "SlicedAttnProcessor": {"slice_size": 2},
}
_SIZE = {"batch": 6, "height": 8, "width": 8}
"""Two images, three times: some processors split the batch into parts with and without guidance."""


def observe_processor(name: str) -> Outcome:
    """Give all self-attentions a processor, patch them in each form, and call the UNet.

    Raises:
        AssertionError: the processor attends like the default one without merging, but not with it.
        Exception: what a patched UNet raises after `apply_patch` has accepted it.
    """
    unet, default = tiny_unet(), tiny_unet()
    try:
        processor = find_class(name)(**_ARGUMENTS.get(name, {}))
        for site in find_sites(unet):
            if "Fused" in name:
                site.attention.fuse_projections()
            site.attention.processor = processor
        plain = call_unet(unet, **_SIZE)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return OTHER_MODELS
    is_like_default = torch.allclose(plain, call_unet(default, **_SIZE), atol=1e-5)
    outcomes = {}
    for form, options in FORMS.items():
        outcomes[form] = _try_to_patch(unet, options)
        if outcomes[form] == WORKS:
            with _patch(unet, **options), _patch(default, **options):
                merged, expected = call_unet(unet, **_SIZE), call_unet(default, **_SIZE)
            assert merged.isfinite().all(), f"{form}: not finite"
            assert torch.allclose(merged, expected, atol=1e-5) == is_like_default, form
            assert torch.equal(call_unet(unet, **_SIZE), plain), f"{form}: not removed"
    return _one_if_equal(outcomes)


# ---- the table ----------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], dict[str, str]], Callable[[str], Outcome]]] = {
    "pipelines": (unet_pipelines, observe_pipeline),
    "processors": (attention_processors, observe_processor),
}


def main(chosen: list[str]) -> int:
    """Record what is chosen, or all but the pipelines that are not run."""
    table = read_table() if TABLE.exists() else {kind: {} for kind in KINDS}
    failed = 0
    for kind, (known, observe) in KINDS.items():
        outcomes = table.get(kind, {})
        for name in sorted(known()):
            is_not_run = str(outcomes.get(name)).startswith(NOT_RUN) and kind == "pipelines"
            if name in chosen or not (chosen or is_not_run):
                started = time.perf_counter()
                try:
                    outcomes[name] = observe(name)
                except Exception:
                    failed += 1
                    traceback.print_exc(limit=-3)
                    print(f"{name}: FAILED", file=sys.stderr)
                print(f"{time.perf_counter() - started:.1f} s  {name}", flush=True)
        table[kind] = {name: outcomes[name] for name in sorted(known()) if name in outcomes}
        TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
