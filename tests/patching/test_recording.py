"""Recorded partitions are those that the denoiser used, step by step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sd_tokenmerge import During, apply_patch
from sd_tokenmerge.patching.patch import find_patch
from tests.patching.spies import SpyMethod
from tests.patching.test_compile import HOW, Backend, compiled, small_unet
from tests.patching.test_reuse import Tape, generate, walk
from tests.tiny_models import call_unet, tiny_sd15, tiny_unet
from tests.tiny_transformers import inputs_of, tiny_transformer

TIMESTEPS = torch.arange(500, 0, -100)


def test_every_partition_of_every_step():
    unet, tape = tiny_unet(), Tape(SpyMethod())
    with apply_patch(unet, tape) as handle, handle.record() as recording:
        walk(unet, TIMESTEPS)
    assert [step.timestep for step in recording.steps] == TIMESTEPS.tolist()
    assert recording.blocks == tuple(row.block for row in handle.report().rows if row.merged)
    for step in recording.steps:
        assert tuple(step.partitions) == recording.blocks
        for recorded in step.partitions.values():
            expected = tape.partitions.pop(0)
            np.testing.assert_array_equal(recorded.labels.reshape(2, -1), expected.labels.numpy())
            assert recorded.labels.shape == (2, 1, 16, 16)
            assert recorded.labels.dtype == np.int32
            assert recorded.num_clusters == 128
    assert not tape.partitions


@pytest.mark.parametrize("share_layers", [False, True])
def test_reused_partitions_are_recorded_where_they_are_used(share_layers):
    unet = tiny_unet()
    with apply_patch(unet, "tome-sd", refresh_every=2, share_layers=share_layers) as handle:
        with handle.record() as recording:
            walk(unet, TIMESTEPS)
        computed = [row.times_computed for row in handle.report().rows if row.merged]
    used = [step.partitions[block] for step in recording.steps for block in recording.blocks]
    assert len(used) == 5 * 5
    assert len(set(used)) == sum(computed) == (3 if share_layers else 15)
    for first, second in [(0, 1), (2, 3)]:
        assert recording.steps[first].partitions == recording.steps[second].partitions


def test_steps_without_merging_have_no_partitions():
    pipe = tiny_sd15()
    rate = During(0.5, start=0.5, stop=1.0)
    with apply_patch(pipe, "grid", keep_rate=rate) as handle, handle.record() as recording:
        generate(pipe, steps=3)
    assert [len(step.partitions) for step in recording.steps] == [0, 0, 5, 5]  # PNDM: 4 calls


def test_nothing_is_kept_by_default():
    unet = tiny_unet()
    with apply_patch(unet, "tome-sd") as handle:
        with handle.record() as recording:
            call_unet(unet)
        call_unet(unet)
        assert len(recording.steps) == 1
        with handle.record() as again:
            call_unet(unet)
        assert len(recording.steps) == len(again.steps) == 1
        assert not unet._forward_pre_hooks


def test_recording_changes_no_output():
    unet = tiny_unet()
    with apply_patch(unet, "tome-sd", refresh_every=2) as handle:
        expected = walk(unet, TIMESTEPS)
        with handle.record():
            for ours, theirs in zip(walk(unet, TIMESTEPS), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow) for how in HOW[:2]] + HOW[2:]
)
def test_recording_begun_after_compiling(how):
    torch._dynamo.reset()
    unet, eager = small_unet(), small_unet()
    module = compiled(unet, how, Backend())
    options = {"method": "tome-sd", "refresh_every": 2}
    with apply_patch(eager, **options) as handle, handle.record() as expected:
        walk(eager, TIMESTEPS)
    with apply_patch(module, **options) as handle:
        walk(module, TIMESTEPS)
        with handle.record() as recording:
            walk(module, TIMESTEPS)
    assert len(recording.steps) == len(expected.steps) == 5
    for ours, theirs in zip(recording.steps, expected.steps, strict=True):
        assert ours.timestep == theirs.timestep
        assert ours.partitions.keys() == theirs.partitions.keys()
        for block, recorded in ours.partitions.items():
            np.testing.assert_array_equal(recorded.labels, theirs.partitions[block].labels)


def test_transformers_take_the_timestep_in_another_place():
    model, inputs = tiny_transformer("flux"), inputs_of("flux")
    first = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    positional = [inputs.pop(name) for name in first]
    with apply_patch(model, "grid", merge="kv") as handle, handle.record() as recording:
        model(*positional, **inputs)
    (step,) = recording.steps
    assert step.timestep == float(inputs_of("flux")["timestep"].max())
    assert tuple(step.partitions) == recording.blocks


def test_a_copy_is_not_recorded():
    unet = tiny_unet()
    with apply_patch(unet, "tome-sd") as handle, handle.record() as recording:
        copied = copy.deepcopy(unet)
        call_unet(copied)
        assert find_patch(copied)._reuse.observer is None
    assert not recording.steps


def test_refusals():
    unet = tiny_unet()
    handle = apply_patch(unet, "tome-sd")
    with (
        handle.record(),
        pytest.raises(RuntimeError, match="already under way"),
        handle.record(),
    ):
        pass
    with handle.record(), pytest.raises(ValueError, match="oops"):
        raise ValueError("oops")
    with handle.record():  # possible again after an error
        call_unet(unet)
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.record()


def test_a_block_that_runs_twice_in_one_call_is_refused():
    unet = tiny_unet()
    transformer = unet.down_blocks[0].attentions[0]
    forward = transformer.forward
    transformer.forward = lambda *args, **kwargs: (
        forward(*args, **kwargs),
        forward(*args, **kwargs),
    )[1]
    handle = apply_patch(unet, "tome-sd")
    call_unet(unet)
    with handle.record(), pytest.raises(RuntimeError, match="repeatedly"):
        call_unet(unet)
