from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from sd_tokenmerge import apply_patch
from sd_tokenmerge.patching.call import CallLog, SchedulerOf
from tests.patching.spies import SpyMethod
from tests.tiny_models import call_unet, tiny_unet, unet_inputs


class Owner:
    """The least that counts as a pipeline."""

    def __init__(self, unet=None, steps=5):
        self.unet = unet
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(steps)


def steps_of(timesteps, owner=None):
    """Step and number of each call."""
    owner = Owner() if owner is None else owner
    log = CallLog(SchedulerOf(owner), needs_step=True, needs_progress=False, needs_values=False)
    calls = [log.begin(timestep) for timestep in timesteps]
    return [(call.step, call.number) for call in calls]


def test_elements_of_timesteps_need_no_scheduler():
    timesteps = torch.tensor([500, 300, 100])
    calls = [t for t in timesteps for _ in range(2)]
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert steps_of(calls, owner=object()) == expected
    assert steps_of([t.expand(4) for t in calls], owner=object()) == expected


def test_equal_timesteps_are_steps_of_their_own():
    """Schedulers of second order have each timestep twice."""
    assert steps_of(torch.tensor([500, 500, 300])) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize(
    "make", [int, float, lambda t: torch.tensor(int(t)), lambda t: t.repeat(3)]
)
def test_other_timesteps_are_found_by_value(make):
    owner = Owner()
    calls = [make(t) for t in owner.scheduler.timesteps]
    assert steps_of([*calls, calls[-1]], owner) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1)]


def test_a_buffer_that_is_updated_in_place():
    """As in serving loops and for CUDA graphs."""
    owner, buffer = Owner(), torch.zeros(1, dtype=torch.int64)

    def buffered():
        for timestep in owner.scheduler.timesteps:
            buffer.copy_(timestep)
            yield buffer
            yield buffer

    steps = [step for step, _ in steps_of(buffered(), owner)]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_values_of_timesteps_that_are_updated_in_place():
    owner = Owner(steps=2)
    timesteps = owner.scheduler.timesteps = torch.tensor([500, 300])
    log = CallLog(SchedulerOf(owner), needs_step=False, needs_progress=False, needs_values=True)
    assert log.begin(timesteps[1]).timesteps == (300.0,)
    timesteps.add_(1)
    assert log.begin(timesteps[1]).timesteps == (301.0,)


@pytest.mark.parametrize("make", [int, lambda t: t])
def test_a_generation_after_an_aborted_one_starts_anew(make):
    """Even where it starts at lower noise, as img2img does."""
    owner = Owner()
    log = CallLog(SchedulerOf(owner), needs_step=True, needs_progress=False, needs_values=False)
    for timestep in owner.scheduler.timesteps[:2]:
        log.begin(make(timestep))
    owner.scheduler.set_timesteps(5)
    call = log.begin(make(owner.scheduler.timesteps[3]))
    assert (call.step, call.number) == (0, 0)


def test_numbers_without_a_scheduler_are_refused():
    unet = tiny_unet()
    apply_patch(unet, "tome-sd", refresh_every=2)
    with pytest.raises(RuntimeError, match="patch the pipeline instead of its UNet"):
        unet(**{**unet_inputs(), "timestep": 500})


def test_new_tensors_without_a_scheduler_are_generations_of_their_own():
    timesteps = (torch.tensor(t) for t in range(700, 0, -100))  # each gone before the next
    assert steps_of(timesteps, owner=object()) == [(0, 0)] * 7
    buffer = torch.zeros(1)
    updated = (buffer.sub_(1) for _ in range(7))
    assert steps_of(updated, owner=object()) == [(0, 0)] * 7


def test_a_block_outside_a_call_of_its_denoiser_is_refused():
    unet = tiny_unet()
    apply_patch(unet, SpyMethod(), share_layers=True)
    call_unet(unet)
    with pytest.raises(RuntimeError, match="must be run by its denoiser"):
        unet.down_blocks[0].attentions[0](torch.randn(2, 32, 16, 16))


def test_a_call_ends_with_an_error_too():
    unet = tiny_unet()
    apply_patch(unet, SpyMethod(), share_layers=True)
    unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_unet(unet)
    with pytest.raises(RuntimeError, match="must be run by its denoiser"):
        unet.down_blocks[0].attentions[0](torch.randn(2, 32, 16, 16))


@pytest.mark.parametrize(
    ("timestep", "values"),
    [
        (7, (7.0,)),
        (torch.tensor(7), (7.0,)),
        (torch.tensor([9, 7, 9]), (7.0, 9.0)),
        (torch.tensor(7.5).expand(3), (7.5,)),
    ],
)
def test_distinct_values_of_a_batch(timestep, values):
    log = CallLog(SchedulerOf(None), needs_step=False, needs_progress=False, needs_values=True)
    assert log.begin(timestep).timesteps == values


def test_new_timesteps_can_not_be_where_old_ones_were_in_memory():
    log = CallLog(SchedulerOf(None), needs_step=True, needs_progress=False, needs_values=False)
    for _ in range(20):
        timesteps = torch.arange(300, 0, -100)
        assert [log.begin(t).step for t in timesteps] == [0, 1, 2]
        del timesteps
