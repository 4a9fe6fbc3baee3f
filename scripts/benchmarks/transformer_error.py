"""Error of merged attention in tiny transformers with random weights: a check of the mechanism.

    python scripts/bench.py transformer-error             seconds

A model of the real class with one narrow block is called unmerged and with each preset. Its tokens
are noise, and none resembles another, so the errors say nothing about trained models.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.markdown import NOT_RUN, conditions, grouped, latest, table
from benchmarks.options import add_common_options
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from benchmarks.transformer import CASES, FRAMES, BlockCalls, Case
from sd_tokenmerge import PRESETS, apply_patch
from sd_tokenmerge.patching.sites import find_sites

COLUMNS, FILE = ("case", "preset", "tokens", "error", *MACHINE), "transformer_error.csv"
TOKENS = (32, 32)
NARROW = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "caption_projection_dim": 32,
    "cross_attention_dim": 32,
    "ffn_dim": 64,
}
FAMILIES = ("sd3-4096", "flux-4096", "flux-single-4096", "pixart-4096", "wan-9360")


def narrow(case: Case) -> Case:
    """The same model with two heads of 16 channels, and fewer tokens."""
    changes = {name: value for name, value in NARROW.items() if name in case.config}
    return replace(case, config=case.config | changes, tokens=TOKENS)


def attention_output(calls: BlockCalls) -> Tensor:
    """What the model's self-attention adds to its image tokens, `[B, N, C]`."""
    (site,) = find_sites(calls.denoiser)
    kind, outputs = type(site.attention), []

    def record(attention: Any, *args: Any, **kwargs: Any) -> Any:
        outputs.append(kind.__call__(attention, *args, **kwargs))
        return outputs[-1]

    # Merging may be outside of the attention's hooks.
    site.attention.__class__ = type(kind.__name__, (kind,), {"__call__": record})
    calls.call(calls.timesteps()[10], TOKENS)
    site.attention.__class__ = kind
    (output,) = outputs
    frames = FRAMES if "Wan" in type(calls.denoiser).__name__ else 1
    image: Tensor = output[0] if isinstance(output, tuple) else output  # else after the text tokens
    return image[:, -TOKENS[0] * TOKENS[1] * frames :]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py transformer-error`."""
    add_common_options(parser)


def run(arguments: argparse.Namespace) -> str:
    """Measure every family, store the rows, return the table."""
    rows = []
    for name in FAMILIES[3:4] if arguments.quick else FAMILIES:
        calls = BlockCalls(narrow(CASES[name]), batch=2, device=arguments.device, dtype="float32")
        plain = attention_output(calls)
        for preset in PRESETS:
            with apply_patch(calls.denoiser, preset=preset):
                error = float((attention_output(calls) - plain).norm() / plain.norm())
            found = {"case": name.rpartition("-")[0], "preset": preset}
            found |= {"tokens": str(plain.shape[1]), "error": f"{error:.4f}"}
            rows.append(found | describe_machine(arguments.device))
    if not arguments.quick:
        append_rows(arguments.out / FILE, COLUMNS, rows)
    return errors_table(rows)


def errors(folder: Path) -> str:
    """Errors by model and preset."""
    return errors_table(read_rows(folder / FILE))


def errors_table(rows: list[dict[str, str]]) -> str:
    """A line for each model."""
    if not rows:
        return NOT_RUN
    rows = latest(rows, ("case", "preset"))
    lines = [
        [
            group[0]["case"],
            f"{int(group[0]['tokens']):,}",
            *(f"{100 * float(row['error']):.1f} %" for row in group),
        ]
        for group in grouped(rows, ["case"])
    ]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    return f"{conditions(rows)}\n\n{table(['', 'tokens', *presets], lines)}"
