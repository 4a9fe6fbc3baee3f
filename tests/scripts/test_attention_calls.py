"""Timing the merged self-attentions: on the right inputs, with patches told of calls."""

from __future__ import annotations

import pytest
import torch
from attention_calls import AttentionCalls
from pipeline_contestants import CONTESTANTS
from timed_unet import QUICK_CONFIG, QUICK_LATENT, TimedUNet

from sd_tokenmerge import apply_patch
from sd_tokenmerge.sites import find_sites


@pytest.fixture
def calls():
    return TimedUNet(QUICK_CONFIG, QUICK_LATENT, 2, "cpu", "float32")


def hooks_of(model):
    return {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


def test_attentions_get_what_they_get_in_a_call(calls):
    seen = []
    sites = find_sites(calls.unet)
    finest = min(site.level for site in sites)
    for site in (site for site in sites if site.level == finest):
        site.attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    timestep = calls.timesteps()[0]
    with torch.no_grad():
        sample, keywords = calls.inputs(calls.latent, calls.latent)
        calls.unet(sample, timestep, **keywords)
        in_call = list(seen)
        attentions = AttentionCalls(calls)
        seen.clear()
        attentions.timed(timestep)
    assert len(in_call) == len(seen) == 3  # one on the way down, two on the way up
    for one, other in zip(in_call, seen, strict=True):
        assert torch.equal(one, other)


def test_patches_are_told_of_each_call(calls):
    attentions = AttentionCalls(calls)
    steps = attentions.timesteps()
    with apply_patch(calls.unet, "atc", keep_rate=0.5, refresh_every=3) as handle:
        for step in (steps[0], steps[1], steps[2], steps[3], attentions.timesteps()[1]):
            attentions.timed(step)
        merged = [row for row in handle.report().rows if row.merged]
        assert len(merged) == 3
        for row in merged:
            assert (row.times_computed, row.times_reused) == (3, 2)


def test_tomesd_is_told_of_the_size(calls):
    attentions = AttentionCalls(calls)
    with CONTESTANTS["tomesd-50"].on(calls.unet):
        attentions.timed(attentions.timesteps()[0])
        assert calls.unet._tome_info["size"] == (QUICK_LATENT, QUICK_LATENT)


def test_only_self_attention_is_timed(calls, monkeypatch):
    ran = []
    for name, module in calls.unet.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    attentions = AttentionCalls(calls)
    ran.clear()
    assert attentions.timed(attentions.timesteps()[0]) > 0
    last = [name for name in ran if "transformer_blocks" in name]
    assert last
    assert all("attn1" in name or "norm1" in name for name in last)
    assert not any("resnets" in name or "conv" in name for name in ran)


def test_nothing_is_left_behind(calls):
    before, hooks = calls.call(calls.timesteps()[3], 16, 16), hooks_of(calls.unet)
    attentions = AttentionCalls(calls)
    attentions.timed(attentions.timesteps()[0])
    assert hooks_of(calls.unet) == hooks
    assert torch.equal(calls.call(calls.timesteps()[3], 16, 16), before)
