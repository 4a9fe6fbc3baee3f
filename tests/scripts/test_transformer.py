"""The benchmark of transformer blocks: real sizes, a round on a tiny model, and the table."""

from __future__ import annotations

import bench
import diffusers
import pytest
import torch
from benchmarks import transformer, transformer_error, unet
from benchmarks.cases import QUICK
from benchmarks.rows import append_rows
from benchmarks.transformer import CASES, FRAMES, BlockCalls

from sd_tokenmerge import PRESETS, apply_patch
from sd_tokenmerge.patching.sites import find_sites


@pytest.mark.parametrize(
    ("case", "heads", "channels", "tokens", "text"),
    [
        ("sd3-4096", 24, 1536, 4096, 333),
        ("flux-4096", 24, 3072, 4096, 512),
        ("flux-single-4096", 24, 3072, 4096, 512),
        ("pixart-4096", 16, 1152, 4096, 300),
        ("pixart-16384", 16, 1152, 16384, 300),
        ("wan-9360", 12, 1536, 9360, 512),
    ],
)
def test_sizes_are_those_of_the_published_models(case, heads, channels, tokens, text):
    case = CASES[case]
    with torch.device("meta"):
        model = getattr(diffusers, case.model).from_config(case.config)
    site = find_sites(model)[0]
    assert (site.heads, site.channels) == (heads, channels)
    inputs = case.inputs(lambda *shape: torch.empty(shape, device="meta"), 1, *case.tokens)
    assert inputs["encoder_hidden_states"].shape[1] == text
    height, width = case.tokens
    assert height * width * (FRAMES if case.model.startswith("Wan") else 1) == tokens


def test_partitions_are_kept_from_step_to_step():
    calls = BlockCalls(CASES[QUICK], batch=2, device="cpu", dtype="float32")
    assert len(find_sites(calls.denoiser)) == 1
    steps = calls.timesteps()
    with apply_patch(calls.denoiser, preset="near-lossless") as handle:
        for step in steps[10:14]:
            calls.timed(step)
    (row,) = handle.report().rows
    assert (row.tokens_before, row.times_computed, row.times_reused) == (1024, 2, 2)


def test_a_trial(capsys, tmp_path):
    bench.main(["transformer", "--quick", "--out", str(tmp_path), "--device", "cpu"])
    text = capsys.readouterr().out
    head, _, *lines = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    names = {f"preset-{name}" for name in PRESETS} | {"oracle-two-sided-12.5"}
    assert names <= {cell.strip("| ") for cell in head}
    assert [line[:2] for line in lines] == [["| quick", "float32"], ["| quick", "bfloat16"]]
    assert all("-" not in (cell.strip("| ") for cell in line) for line in lines)  # none is missing
    assert not list(tmp_path.iterdir())


def test_errors_are_those_of_image_tokens_and_none_without_merging(tmp_path, capsys):
    calls = BlockCalls(
        transformer_error.narrow(CASES["pixart-4096"]), batch=1, device="cpu", dtype="float32"
    )
    plain = transformer_error.attention_output(calls)
    assert plain.shape == (1, 1024, 32)
    with apply_patch(calls.denoiser, keep_rate=1.0):
        assert torch.equal(transformer_error.attention_output(calls), plain)
    bench.main(["transformer-error", "--quick", "--out", str(tmp_path), "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    name, tokens, *errors = line.strip("| ").split(" | ")
    assert (name, tokens, len(errors)) == ("pixart", "1,024", len(PRESETS))
    assert all(0 < float(error.removesuffix(" %")) < 200 for error in errors)
    assert not list(tmp_path.iterdir())


def test_the_table(tmp_path):
    row = dict.fromkeys(unet.COLUMNS, "1") | {"benchmark": "transformer-block", "kept_ms": ""}
    rows = [
        row | {"case": "sd3-4096", "contestant": name, "speedup": speedup}
        for name, speedup in (
            ("unpatched", "1"),
            ("oracle-two-sided-6.25", "4"),
            ("preset-balanced", "2"),
        )
    ]
    append_rows(tmp_path / transformer.FILE, unet.COLUMNS, rows)
    text = transformer.block_times(tmp_path)
    assert "| turns | oracle-two-sided-6.25 | preset-balanced |" in text
    assert "| sd3-4096 | 1 | 0.00 | 1 | 4.00x | 2.00x (50 %) |" in text
