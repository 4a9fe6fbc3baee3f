from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from sd_tokenmerge import Grid, Method, ToMeSD, apply_patch
from sd_tokenmerge.patching.call import DenoiserCall
from sd_tokenmerge.patching.compiled import register
from sd_tokenmerge.patching.patch import find_patch
from sd_tokenmerge.patching.reuse import PartitionReuse
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import SpyMethod, traced
from tests.tiny_models import call_unet, tiny_sd15, tiny_unet, unet_inputs

CALLS_THE_UNET_MORE_THAN_ONCE = [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler]


@dataclass(frozen=True)
class Tape(Method):
    """Keeps the partitions of another method, or hands out those it was given, one per call."""

    name = "tape"

    def __init__(self, method=None):
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "partitions", [])

    def _cluster(self, tokens, num_clusters, grid, seed, scores):
        if self.method is None:
            return self.partitions.pop(0)
        self.partitions.append(self.method(tokens, num_clusters, grid=grid))
        return self.partitions[-1]


def counts(handle, block=0):
    row = [row for row in handle.report().rows if row.merged][block]
    return row.times_computed, row.times_reused


def generate(pipe, steps=7, images=1, size=64, **options):
    return pipe(
        ["a dog"] * images,
        num_inference_steps=steps,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


def walk(unet, timesteps, **options):
    """Call the UNet as a denoising loop does."""
    inputs = unet_inputs(**options)
    with torch.no_grad():
        return [unet(**{**inputs, "timestep": t}).sample for t in timesteps]


class TestRefreshEvery:
    @pytest.mark.parametrize(("every", "computed"), [(1, 7), (2, 4), (3, 3), (7, 1), (100, 1)])
    def test_partition_is_computed_on_every_nth_step(self, every, computed):
        unet, spy = tiny_unet(), SpyMethod()
        handle = apply_patch(unet, spy, refresh_every=every)
        walk(unet, torch.arange(700, 0, -100))
        assert len(spy.calls) == 5 * computed
        for block in range(5):
            assert counts(handle, block) == (computed, 7 - computed)

    def test_a_reused_partition_is_that_of_the_last_refresh(self):
        unet, fresh = tiny_unet(), tiny_unet()
        apply_patch(unet, "tome-sd", refresh_every=2)
        apply_patch(fresh, "tome-sd")
        timesteps = torch.arange(400, 0, -100)
        kept, always_fresh = walk(unet, timesteps), walk(fresh, timesteps)
        same = [torch.equal(*pair) for pair in zip(kept, always_fresh, strict=True)]
        assert same == [True, False, True, False]
        # The second step, with the first step's partitions played back.
        recorded, player = tiny_unet(), tiny_unet()
        record, playback = Tape(ToMeSD()), Tape()
        apply_patch(recorded, record)
        walk(recorded, timesteps[:1])
        playback.partitions.extend(record.partitions)
        apply_patch(player, playback)
        assert torch.equal(walk(player, timesteps[1:2])[0], kept[1])

    @pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # KDPM2
    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler,
            DPMSolverMultistepScheduler,
            EulerDiscreteScheduler,
            EulerAncestralDiscreteScheduler,
            UniPCMultistepScheduler,
            LCMScheduler,
            *CALLS_THE_UNET_MORE_THAN_ONCE,
        ],
    )
    def test_schedulers(self, scheduler):
        pipe = tiny_sd15()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        handle = apply_patch(pipe, SpyMethod(), refresh_every=3)
        with traced(pipe.unet.conv_in) as trace:
            for _ in range(2):
                generate(pipe)
        calls = len(trace.outputs) // 2
        assert (calls > 7) == (scheduler in CALLS_THE_UNET_MORE_THAN_ONCE)
        computed = -(-calls // 3)
        assert counts(handle) == (2 * computed, 2 * (calls - computed))

    def test_an_aborted_run_leaves_nothing_behind(self):
        pipe = tiny_sd15()
        apply_patch(pipe, "tome-sd", refresh_every=4)
        expected = generate(pipe)
        for stop_after in (0, 1, 2):

            def stop(pipe, step, timestep, tensors, stop_after=stop_after):
                if step == stop_after:
                    raise KeyboardInterrupt
                return tensors

            with pytest.raises(KeyboardInterrupt):
                generate(pipe, callback_on_step_end=stop, negative_prompt=["a cat"])
            assert torch.equal(generate(pipe), expected)

    def test_img2img_after_an_aborted_run(self):
        pipe = tiny_sd15()
        img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        img2img.set_progress_bar_config(disable=True)
        picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

        def redraw():
            return generate_img2img(img2img, picture)

        handle = apply_patch(pipe, "tome-sd", refresh_every=4)
        expected = redraw()
        calls = sum(counts(handle))
        assert calls < 10

        def stop(pipe, step, timestep, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # stops earlier in the noise than img2img begins
            generate(pipe, steps=10, callback_on_step_end=stop)
        before = counts(handle)
        assert torch.equal(redraw(), expected)
        assert counts(handle)[0] - before[0] == -(-calls // 4)

    def test_another_size_batch_or_guidance_computes_anew(self):
        pipe = tiny_sd15()
        handle = apply_patch(pipe, SpyMethod(), refresh_every=10)
        for options in ({}, {"images": 2}, {"size": 128}, {"guidance_scale": 1.0}, {}):
            generate(pipe, **options)
        calls = sum(counts(handle))
        assert counts(handle) == (5, calls - 5)

    def test_guidance_that_ends_half_way_computes_anew(self):
        pipe = tiny_sd15()
        handle = apply_patch(pipe, "tome-sd", refresh_every=100)

        def end_guidance(pipe, step, timestep, tensors):
            if step == 3:
                pipe._guidance_scale = 0.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return tensors

        generate(
            pipe,
            callback_on_step_end=end_guidance,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
        assert counts(handle)[0] == 2

    @pytest.mark.parametrize("share_layers", [False, True])
    def test_calls_within_a_step_keep_a_partition_each(self, share_layers):
        unet, alone = tiny_unet(), tiny_unet()
        handle = apply_patch(unet, "tome-sd", refresh_every=4, share_layers=share_layers)
        apply_patch(alone, "tome-sd", refresh_every=4, share_layers=share_layers)
        timesteps = torch.arange(400, 0, -100)
        inputs = unet_inputs(batch=2)
        with torch.no_grad():
            # guidance in two calls instead of one with twice the batch
            split = [
                torch.cat(
                    [
                        unet(sample, t, text).sample
                        for sample, text in zip(
                            inputs["sample"].split(1),
                            inputs["encoder_hidden_states"].split(1),
                            strict=True,
                        )
                    ]
                )
                for t in timesteps
            ]
        together = walk(alone, timesteps)
        torch.testing.assert_close(torch.stack(split), torch.stack(together), rtol=0, atol=1e-5)
        assert counts(handle) == (2, 6)
        assert counts(handle, 1) == ((0, 8) if share_layers else (2, 6))

    def test_many_calls_in_one_step_are_all_right(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), refresh_every=2)
        timesteps = torch.tensor([500, 300])
        for t in timesteps:
            walk(unet, [t] * 70, batch=1, height=8, width=8)
        assert counts(handle) == (70 + 6, 64)

    def test_one_step_generations_are_always_fresh(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), refresh_every=5)
        for _ in range(4):
            walk(unet, torch.tensor([999]))
        assert counts(handle) == (4, 0)

    def test_timesteps_may_be_expanded_over_the_batch(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), refresh_every=5)
        walk(unet, [t.expand(2) for t in torch.arange(700, 0, -100)])
        assert counts(handle) == (2, 5)

    def test_ascending_timesteps(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), refresh_every=2)
        walk(unet, torch.arange(100, 500, 100))  # inversion
        assert counts(handle) == (2, 2)

    def test_positional_and_keyword_timesteps(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), refresh_every=2)
        inputs = unet_inputs()
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        first, second = torch.tensor([500, 300])
        with torch.no_grad():
            unet(sample, first, text)
            unet(sample, encoder_hidden_states=text, timestep=second)
        assert counts(handle) == (1, 1)


class TestShareLayers:
    @pytest.mark.parametrize("levels", [1, 2])
    def test_the_first_block_of_a_level_computes(self, levels):
        unet, spy = tiny_unet(), SpyMethod()
        handle = apply_patch(unet, spy, share_layers=True, levels=levels)
        for _ in range(3):
            call_unet(unet)
        assert [call.grid for call in spy.calls] == [Grid(16, 16), Grid(8, 8)][:levels] * 3
        computed = [row.times_computed for row in handle.report().rows if row.merged]
        reused = [row.times_reused for row in handle.report().rows if row.merged]
        assert sum(computed) == 3 * levels
        assert [a + b for a, b in zip(computed, reused, strict=True)] == [3] * 5 * levels

    def test_shared_partitions_are_those_of_this_call(self):
        unet, again = tiny_unet(), tiny_unet()
        apply_patch(unet, "tome-sd", share_layers=True)
        apply_patch(again, "tome-sd", share_layers=True)
        call_unet(unet, timestep=900)
        assert torch.equal(call_unet(unet), call_unet(again))

    def test_is_not_what_every_block_would_have_chosen(self):
        unet, own = tiny_unet(), tiny_unet()
        apply_patch(unet, "tome-sd", share_layers=True)
        apply_patch(own, "tome-sd")
        assert not torch.allclose(call_unet(unet), call_unet(own), atol=1e-4)

    def test_sizes_may_change(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd", share_layers=True, refresh_every=3)
        for size in (16, 24, 16):
            walk(unet, torch.arange(400, 0, -100), height=size)

    def test_with_refresh_every(self):
        unet = tiny_unet()
        handle = apply_patch(unet, SpyMethod(), share_layers=True, refresh_every=3)
        walk(unet, torch.arange(700, 0, -100))
        assert counts(handle, 0) == (3, 4)
        assert counts(handle, 1) == (0, 7)


def test_a_compiled_graph_may_overwrite_the_labels_it_gets():
    reuse = PartitionReuse(SpyMethod(), 0, refresh_every=3, paths=["block"], sources=[None])
    register(reuse)
    labels = []
    for step in range(3):
        reuse.begin_call(DenoiserCall(step=step))
        got, _ = torch.ops.sd_tokenmerge.choose_labels(
            torch.randn(2, 12, 4), None, reuse.blocks[0].ticket, 5, [3, 4], 0
        )
        labels.append(got.clone())
        got.zero_()
    assert reuse.blocks[0].times_reused == 2
    assert labels[0].max() == 4
    assert torch.equal(labels[1], labels[0])
    assert torch.equal(labels[2], labels[0])


class Chunked(torch.nn.Module):
    """Runs a block on one image after another, as AnimateDiff's FreeNoise does with frames."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
        chunks = zip(hidden_states.split(1), encoder_hidden_states.split(1), strict=True)
        return torch.cat(
            [self.block(image, encoder_hidden_states=text, **kwargs) for image, text in chunks]
        )


@pytest.mark.parametrize("share_layers", [False, True])
def test_a_block_that_runs_twice_in_one_call_has_two_partitions(share_layers):
    unet, whole = tiny_unet(), tiny_unet()
    options = {"refresh_every": 3, "share_layers": share_layers}
    handle = apply_patch(unet, "tome-sd", **options)
    apply_patch(whole, "tome-sd", **options)
    for site in find_sites(unet):
        site.transformer.transformer_blocks[0] = Chunked(site.block)
    timesteps = torch.arange(400, 0, -100)
    for got, expected in zip(walk(unet, timesteps), walk(whole, timesteps), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert counts(handle) == (4, 4)
    assert counts(handle, 1) == ((0, 8) if share_layers else (4, 4))


def test_kept_partitions_take_no_memory_where_none_are_reused():
    unet = tiny_unet()
    apply_patch(unet, "tome-sd")
    call_unet(unet)
    assert all(not block.kept for block in find_patch(unet)._reuse.blocks)


def generate_img2img(pipe, picture):
    return pipe(
        "a dog",
        image=picture,
        strength=0.6,
        num_inference_steps=10,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
