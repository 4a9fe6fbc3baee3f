"""A patched UNet that two threads call at a time: refused, and never a wrong result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

from sd_tokenmerge import Linear, apply_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import SpyMethod
from tests.patching.test_coexistence import Owner
from tests.tiny_models import tiny_unet, unet_inputs

FORMS = [
    {},
    {"refresh_every": 2, "share_layers": True},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"merge": "kv", "features": "keys"},
            {"method": "random"},
            {"keep_rate": Linear(1.0, 0.3)},
        )
    ),
]


def places(unet):
    """Modules in which the first of two calls is held up, inside and outside a transformer."""
    site = find_sites(unet)[0]
    return {
        "before the block": site.transformer.proj_in,
        "in the block": site.block.norm1,
        "in the attention": site.attention.to_q,
        "after the block": site.transformer.proj_out,
        "after the transformer": unet.down_blocks[0].resnets[1],
    }


def inputs_of(owner, index, sizes):
    """Arguments of the call with the scheduler's timestep of that index."""
    height, width = sizes[index]
    timestep = owner.scheduler.timesteps[index]
    return {**unet_inputs(height=height, width=width), "timestep": timestep}


def two_calls(owner, hold_up, *, overtake, sizes):
    """Results or errors of two calls; the second begins while the first is held up.

    Args:
        owner: a patched pipeline.
        hold_up: gets a function, and makes both calls run it at a place of its choice.
        overtake: whether the second call ends while the first is held up; otherwise it waits in the
            same place until the first ends.
        sizes: of the two calls' latents.
    """
    reached, go_on, first_ended = Event(), Event(), Event()
    calls = []

    def pause(*_):
        calls.append(None)
        if len(calls) == 1:
            reached.set()
            assert go_on.wait(30)
        elif len(calls) == 2 and not overtake:
            go_on.set()
            assert first_ended.wait(30)

    @torch.no_grad()
    def call(index):
        timestep = owner.scheduler.timesteps[index]
        inputs = {
            **unet_inputs(height=sizes[index][0], width=sizes[index][1]),
            "timestep": timestep,
        }
        try:
            return owner.unet(**inputs).sample
        except (RuntimeError, ValueError) as error:
            return error
        finally:
            (first_ended if index == 0 else go_on).set()

    hold_up(pause)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, 0)
        assert reached.wait(30)
        second = pool.submit(call, 1)
        return first.result(60), second.result(60)


@pytest.mark.parametrize("place", places(tiny_unet()))
@pytest.mark.parametrize("overtake", [True, False])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_one_of_two_threads_is_refused_and_no_result_is_wrong(options, overtake, place):
    sizes = [(8, 16), (16, 8)]
    expected = []
    for index in range(2):
        owner = Owner(tiny_unet())
        with torch.no_grad(), apply_patch(owner, **{"method": "tome-sd", **options}):
            expected.append(owner.unet(**inputs_of(owner, index, sizes)).sample)

    owner = Owner(tiny_unet())
    apply_patch(owner, **{"method": "tome-sd", **options})
    hold_up = places(owner.unet)[place].register_forward_pre_hook
    results = two_calls(owner, hold_up, overtake=overtake, sizes=sizes)
    refused = [result for result in results if isinstance(result, Exception)]
    for result, right in zip(results, expected, strict=True):
        if isinstance(result, Exception):
            assert isinstance(result, RuntimeError)
            assert "from two threads at a time" in str(result)
        else:
            assert torch.equal(result, right)
    needs_call = not {"refresh_every", "keep_rate"}.isdisjoint(options) or "random" in str(options)
    assert len(refused) == (needs_call or place != "after the transformer")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks"])
def test_compiled_denoisers(how, monkeypatch):
    owner = Owner(tiny_unet())
    apply_patch(owner, SpyMethod(), refresh_every=2)
    getattr(owner.unet, how)(backend="eager")

    def hold_up(pause):
        cluster = SpyMethod._cluster
        monkeypatch.setattr(SpyMethod, "_cluster", lambda *args: (pause(), cluster(*args))[1])

    results = two_calls(owner, hold_up, overtake=True, sizes=[(16, 16)] * 2)
    assert "from two threads at a time" in str(results[0])
    assert isinstance(results[1], torch.Tensor)


def test_one_thread_after_the_other_works():
    owner = Owner(tiny_unet())
    apply_patch(owner, "tome-sd", refresh_every=2)
    timestep = owner.scheduler.timesteps[0]
    with ThreadPoolExecutor(1) as pool:
        inputs = {**unet_inputs(), "timestep": timestep}
        with torch.no_grad():
            here = owner.unet(**inputs).sample
        there = pool.submit(torch.no_grad()(owner.unet), **inputs).result(60).sample
    assert torch.equal(here, there)
