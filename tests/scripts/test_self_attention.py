"""Timing the merged self-attentions: on the right inputs, with patches told of each call."""

from __future__ import annotations

import pytest
import torch
from benchmarks.cases import CASES, QUICK, build
from benchmarks.contestants import CONTESTANTS
from benchmarks.self_attention import SelfAttentionCalls
from diffusers import UNet2DConditionModel

from sd_tokenmerge import apply_patch
from sd_tokenmerge.bench.calls import finest_transformers


@pytest.fixture
def calls():
    return build(QUICK)


def hooks_of(model):
    return {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("case", "parameters", "level", "transformers"),
    [
        ("sd15-512", 859_520_964, 0, 5),
        ("sd21-768", 865_910_724, 0, 5),
        ("sdxl-1024", 2_567_463_684, 1, 5),
    ],
)
def test_architectures_are_those_of_the_published_models(case, parameters, level, transformers):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CASES[case].config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    found = finest_transformers(unet)
    assert (found[0], len(found[1])) == (level, transformers)


def test_attentions_get_what_they_get_in_a_call(calls):
    seen = []
    for transformer in finest_transformers(calls.denoiser)[1]:
        attention = transformer.transformer_blocks[0].attn1
        attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    timestep = calls.timesteps()[0]
    calls.call(timestep, (calls.latent, calls.latent))
    in_call = list(seen)
    attentions = SelfAttentionCalls(calls)
    seen.clear()
    attentions.timed(timestep)
    assert len(in_call) == len(seen) == 3  # one on the way down, two on the way up
    for one, other in zip(in_call, seen, strict=True):
        assert torch.equal(one, other)


def test_patches_are_told_of_each_call(calls):
    attentions = SelfAttentionCalls(calls)
    steps = attentions.timesteps()
    with apply_patch(calls.denoiser, "atc", keep_rate=0.5, refresh_every=3) as handle:
        for step in (steps[0], steps[1], steps[2], steps[3], attentions.timesteps()[1]):
            attentions.timed(step)
        merged = [row for row in handle.report().rows if row.merged]
    assert len(merged) == 3
    for row in merged:
        assert (row.times_computed, row.times_reused) == (3, 2)


def test_tomesd_is_told_of_the_size(calls):
    attentions = SelfAttentionCalls(calls)
    with CONTESTANTS["tomesd-50"].on(calls.denoiser):
        attentions.timed(attentions.timesteps()[0])
        assert calls.denoiser._tome_info["size"] == (calls.latent, calls.latent)


def test_only_self_attention_runs(calls):
    ran = []
    for name, module in calls.denoiser.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    attentions = SelfAttentionCalls(calls)
    ran.clear()
    assert attentions.timed(attentions.timesteps()[0]).wall > 0
    inside = [name for name in ran if "transformer_blocks" in name]
    assert inside
    assert all("attn1" in name or "norm1" in name for name in inside)
    assert not any("resnets" in name or "conv" in name for name in ran)


def test_nothing_is_left_behind(calls):
    timestep = calls.timesteps()[3]
    before, hooks = calls.call(timestep, (16, 16)), hooks_of(calls.denoiser)
    attentions = SelfAttentionCalls(calls)
    attentions.timed(attentions.timesteps()[0])
    assert hooks_of(calls.denoiser) == hooks
    assert torch.equal(calls.call(timestep, (16, 16)), before)
