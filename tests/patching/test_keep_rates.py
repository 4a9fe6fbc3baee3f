from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge import Depth, During, Grid, Linear, apply_patch, clusters_to_keep
from sd_tokenmerge.keep_rates import (
    Constant,
    KeepRate,
    format_keep_rates,
    parse_keep_rate,
    parse_keep_rates,
)
from sd_tokenmerge.patching.patch import find_patch
from tests.patching.spies import SpyMethod
from tests.patching.test_compile import Backend, compiled, small_unet
from tests.tiny_models import call_unet, tiny_sd15, tiny_unet, unet_inputs


def kept(spy, num_blocks=5):
    """Clusters of each call of the denoiser; all blocks must agree."""
    counts = [call.num_clusters for call in spy.calls]
    assert len(counts) % num_blocks == 0
    calls = [counts[i : i + num_blocks] for i in range(0, len(counts), num_blocks)]
    assert all(len(set(call)) == 1 for call in calls)
    return [call[0] for call in calls]


class TestValues:
    def test_linear_goes_in_equal_stages(self):
        rate = Linear(1.0, 0.4, stages=4)
        assert rate.all_at(0.5) == (1.0, 0.8, 0.6, 0.4)
        progress = [0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.999, 1]
        assert [rate.at(p, 0) for p in progress] == [1, 1, 0.8, 0.8, 0.6, 0.4, 0.4, 0.4]

    def test_linear_may_go_up(self):
        assert Linear(0.2, 0.6, stages=3).all_at(0) == (0.2, 0.4, 0.6)

    def test_progress_outside_its_range(self):
        assert [Linear(1, 0.5).at(p, 0) for p in (-0.5, 1.5)] == [1, 0.5]

    def test_during(self):
        rate = During(0.5, start=0.2, stop=0.6)
        assert [rate.at(p, 0) for p in (0, 0.19, 0.2, 0.59, 0.6, 1)] == [1, 1, 0.5, 0.5, 1, 1]
        assert rate.all_at(0) == (1.0, 0.5, 1.0)
        assert During(0.5).all_at(0) == (0.5,)
        assert During(0.5).at(1.0, 0) == 0.5
        assert During(0.5, stop=0.9).all_at(0) == (0.5, 1.0)

    @pytest.mark.parametrize("num_blocks", [2, 5, 12])
    @pytest.mark.parametrize("average", [0.55, 0.7, 0.9])
    def test_depth_removes_what_equation_5_says(self, num_blocks, average):
        num_tokens = 4096
        t = num_tokens * (1 - average)
        removed = [
            num_tokens - clusters_to_keep(num_tokens, Depth(average).at(0, place))
            for place in (block / (num_blocks - 1) for block in range(num_blocks))
        ]
        # ATC, eq. (5), as printed
        expected = [int(2 * t - 2 * t * block / (num_blocks - 1)) for block in range(num_blocks)]
        assert all(abs(a - b) <= 1 for a, b in zip(removed, expected, strict=True))
        assert removed[-1] == 0
        assert sum(removed) == pytest.approx(t * num_blocks, abs=num_blocks)


class TestStrings:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0.5", Constant(0.5)),
            ("50%", Constant(0.5)),
            ("62.5%", Constant(0.625)),
            ("1", Constant(1.0)),
            (".25", Constant(0.25)),
            ("linear:first=1,last=0.4", Linear(1, 0.4)),
            ("linear:last=0.4,first=1,stages=3", Linear(1, 0.4, 3)),
            ("during:rate=0.5,stop=0.6", During(0.5, stop=0.6)),
            ("depth:rate=0.7", Depth(0.7)),
        ],
    )
    def test_are_read_and_written(self, text, expected):
        assert parse_keep_rate(text) == expected
        assert parse_keep_rate(str(expected)) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0=0.5", {0: Constant(0.5)}),
            ("2=0.5,0=1", {0: Constant(1.0), 2: Constant(0.5)}),
            ("0=linear:first=1,last=0.4,1=0.8", {0: Linear(1, 0.4), 1: Constant(0.8)}),
            ("1=depth:rate=0.7,10=during:rate=0.5,stop=0.6", None),
        ],
    )
    def test_by_level(self, text, expected):
        found = parse_keep_rates(text)
        assert found == (expected or {1: Depth(0.7), 10: During(0.5, stop=0.6)})
        assert list(found) == sorted(found)
        assert parse_keep_rates(format_keep_rates(found)) == found
        assert parse_keep_rates(found) == found

    @given(st.floats(0, 1, exclude_min=True), st.floats(1e-9, 1), st.integers(2, 8))
    def test_no_digit_is_lost(self, first, last, stages):
        for rate in (Constant(first), Linear(first, last, stages), During(first, 0.0, last)):
            assert parse_keep_rates(str(rate)) == rate
            assert parse_keep_rates(format_keep_rates({3: rate, 0: rate})) == {0: rate, 3: rate}

    def test_every_kind_is_written_as_a_constant_is(self):
        assert str(Constant(1)) == "1"
        assert str(Constant(1e-5)) == "0.00001"
        assert str(Linear(1.0, 0.25)) == "linear:first=1,last=0.25,stages=5"
        assert isinstance(parse_keep_rates(0.5), KeepRate)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0=0.5,0=0.6", "must name each level once, got '0=0.5,0=0.6'"),
            ("0=0.5,half", "or a keep rate for each level, such as 0=0.5,1=0.8; got '0.5,half'"),
            ("0=", "got ''"),
            ("0=1.5", r"must be in \(0, 1\], got 1.5"),
            ("-1=0.5", "got '-1=0.5'"),
            ("fine=0.5", "got 'fine=0.5'"),
            ("0=1=0.5", "got '1=0.5'"),
        ],
    )
    def test_nothing_is_guessed_by_level(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_keep_rates(text)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "half", "50 %", "%", "-0.5", "1e-1", "nan", "linear", "linear:", "depth:rate"),
            *("linear:first=1", "linear:first=1,last=0.4,steps=5", "linear:first=1,first=1,last=1"),
            *("linear:first=1, last=0.4", "linear:first=1,last=0.4,stages=2.5", "constant:rate=1"),
        ],
    )
    def test_nothing_is_guessed(self, text):
        with pytest.raises(ValueError, match="`keep_rate`"):
            parse_keep_rate(text)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: Linear(0, 0.5), ValueError, r"`first` must be in \(0, 1\], got 0"),
            (lambda: Linear(1, 1.5), ValueError, r"`last` must be in \(0, 1\], got 1.5"),
            (lambda: Linear(1, 0.5, 1), ValueError, r"`stages` must be in \[2, 8\], got 1"),
            (lambda: Linear(1, 0.5, 9), ValueError, r"`stages` must be in \[2, 8\], got 9"),
            (lambda: Linear(1, 0.5, 4.0), TypeError, "`stages` must be an integer, got 4.0"),
            (lambda: Linear("1", 0.5), TypeError, "`first` must be a number, got '1'"),
            (lambda: During(0.5, 0.6, 0.6), ValueError, "0 <= start < stop <= 1, got 0.6 and 0.6"),
            (lambda: During(0.5, -0.1), ValueError, "`start` and `stop`"),
            (lambda: During(0.5, stop=1.1), ValueError, "`start` and `stop`"),
            (lambda: During(0.5, stop=True), TypeError, "`stop` must be a number, got True"),
            (lambda: Depth(0.5), ValueError, r"`rate` of depth must be in \(0.5, 1\], got 0.5"),
            (lambda: parse_keep_rate(2.0), ValueError, r"`keep_rate` must be in \(0, 1\], got 2"),
            (lambda: parse_keep_rate(None), TypeError, "`keep_rate` must be a number, got None"),
        ],
    )
    def test_bad_values_are_refused(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


class Owner:
    """The least that counts as a pipeline."""

    def __init__(self, unet, scheduler=None):
        self.unet = unet
        self.scheduler = DDIMScheduler() if scheduler is None else scheduler


class TestOverSteps:
    @pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_in_a_pipeline(self, scheduler):
        pipe, spy = tiny_sd15(), SpyMethod()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        apply_patch(pipe, spy, keep_rate=Linear(0.9, 0.5, stages=2))
        pipe("text", num_inference_steps=6, output_type="latent")
        assert kept(spy) == [clusters_to_keep(256, rate) for rate in (0.9,) * 3 + (0.5,) * 3]

    def test_both_calls_of_a_step_keep_the_same(self):
        pipe, spy = tiny_sd15(), SpyMethod()
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        apply_patch(pipe, spy, keep_rate="linear:first=0.8,last=0.4,stages=3")
        pipe("text", num_inference_steps=4, output_type="latent")
        count = len(pipe.scheduler.timesteps)
        assert count == 7  # 4 steps: the last has one call
        stages = [index * 3 // count for index in range(count)]
        assert kept(spy) == [clusters_to_keep(256, (0.8, 0.6, 0.4)[stage]) for stage in stages]

    def test_nothing_is_merged_before_start_and_after_stop(self):
        unet, plain, spy = tiny_unet(), tiny_unet(), SpyMethod()
        owner = Owner(unet)
        handle = apply_patch(owner, spy, keep_rate=During(0.5, start=0.3, stop=0.8))
        for timestep, merged in (
            (900, False),
            (700, False),
            (699, True),
            (200, True),
            (199, False),
        ):
            spy.calls.clear()
            got = call_unet(unet, timestep=timestep)
            assert torch.equal(got, call_unet(plain, timestep=timestep)) == (not merged)
            assert kept(spy) == ([128] if merged else [])
            assert handle.report().rows[0].tokens_after == (128 if merged else 256)

    def test_the_noisiest_image_of_a_batch_decides(self):
        unet, spy = tiny_unet(), SpyMethod()
        owner = Owner(unet)
        apply_patch(owner, spy, keep_rate=During(0.5, stop=0.5))
        for timesteps, merged in (([400, 600], True), ([400, 300], False)):
            spy.calls.clear()
            with torch.no_grad():
                unet(**{**unet_inputs(), "timestep": torch.tensor(timesteps)})
            assert bool(spy.calls) == merged

    @pytest.mark.parametrize(
        "scheduler",
        [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler],
    )
    def test_schedulers_whose_timesteps_are_no_training_steps(self, scheduler):
        """EDM's timesteps are logarithms of noise levels: -1.55 is the last."""
        unet, spy = tiny_unet(), SpyMethod()
        owner = Owner(unet, scheduler())
        owner.scheduler.set_timesteps(10)
        apply_patch(owner, spy, keep_rate=During(0.5, stop=0.4))
        with torch.no_grad():
            for timestep in owner.scheduler.timesteps:
                unet(**{**unet_inputs(), "timestep": timestep})
        assert len(spy.calls) == 4 * 5

    def test_timesteps_of_another_scheduler_are_refused(self):
        unet = tiny_unet()
        owner = Owner(unet)
        owner.scheduler.set_timesteps(10)
        apply_patch(owner, SpyMethod(), keep_rate=During(0.5, stop=0.5))
        with pytest.raises(RuntimeError, match=r"one of the scheduler's timesteps.*got 898\.5"):
            call_unet(unet, timestep=898.5)

    def test_a_scheduler_may_be_replaced(self):
        pipe, spy = tiny_sd15(), SpyMethod()
        apply_patch(pipe, spy, keep_rate=Linear(0.9, 0.5, stages=2))
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe("text", num_inference_steps=4, output_type="latent")
        assert kept(spy) == [clusters_to_keep(256, rate) for rate in (0.9, 0.9, 0.5, 0.5)]

    def test_img2img_starts_where_its_noise_does(self):
        pipe, spy = tiny_sd15(), SpyMethod()
        img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        img2img.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        apply_patch(img2img, spy, keep_rate=Linear(0.9, 0.5, stages=2))
        picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        img2img("a dog", picture, strength=0.6, num_inference_steps=10, output_type="latent")
        assert kept(spy) == [clusters_to_keep(256, rate) for rate in (0.9,) + (0.5,) * 5]

    def test_a_copied_pipeline_has_its_own_scheduler(self):
        pipe, spy = tiny_sd15(), SpyMethod()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        apply_patch(pipe, spy, keep_rate=Linear(0.9, 0.5, stages=2))
        twin = copy.deepcopy(pipe)
        spy_of_twin = find_patch(twin.unet)._reuse.method
        del pipe
        twin("text", num_inference_steps=4, output_type="latent")
        rates = (0.9, 0.9, 0.5, 0.5)
        assert kept(spy_of_twin) == [clusters_to_keep(256, rate) for rate in rates]

    def test_a_copied_unet_has_no_scheduler(self):
        pipe = tiny_sd15()
        apply_patch(pipe, SpyMethod(), keep_rate=Linear(0.9, 0.5, stages=2))
        unet = copy.deepcopy(pipe.unet)
        with pytest.raises(RuntimeError, match="patch the pipeline instead of its UNet"):
            call_unet(unet)

    def test_partitions_are_reused_within_a_stage_only(self):
        unet = tiny_unet()
        owner = Owner(unet)
        owner.scheduler.set_timesteps(10)
        handle = apply_patch(
            owner, SpyMethod(), keep_rate=Linear(0.8, 0.4, stages=2), refresh_every=4
        )
        with torch.no_grad():
            for timestep in owner.scheduler.timesteps:
                unet(**{**unet_inputs(), "timestep": timestep})
        row = handle.report().rows[0]
        # steps 0-4 keep 0.8, 5-9 keep 0.4; due at 0, 4, 8, and at 5 for the other number
        assert (row.times_computed, row.times_reused) == (4, 6)

    def test_compiled_once_for_each_stage(self):
        eager, unet, backend = small_unet(), small_unet(), Backend()
        plain = call_unet(small_unet())
        torch._dynamo.reset()
        keep_rate = Linear(1.0, 0.4, stages=4)
        owners = Owner(eager), Owner(unet)
        apply_patch(owners[0], "tome-sd", keep_rate=keep_rate)
        handle = apply_patch(owners[1], "tome-sd", keep_rate=keep_rate)
        module = compiled(unet, "wrapped", backend)
        kept_tokens = []
        for timestep in (900, 800, 700, 600, 400, 300, 100, 50, 900, 400):
            got, expected = (call_unet(m, timestep=timestep) for m in (module, eager))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            kept_tokens.append(handle.report().rows[0].tokens_after)
        assert kept_tokens == [256, 256, 205, 205, 154, 154, 103, 103, 256, 154]
        assert backend.graphs == 4
        assert not torch.allclose(call_unet(module, timestep=400), plain, atol=1e-3)


class TestOverBlocksAndLevels:
    def test_depth_keeps_less_in_early_blocks(self):
        unet, spy = tiny_unet(), SpyMethod()
        handle = apply_patch(unet, spy, keep_rate=Depth(0.7))
        call_unet(unet)
        counts = [call.num_clusters for call in spy.calls]
        assert counts == [
            clusters_to_keep(256, rate) for rate in (0.4, 0.55, 0.7, 0.85)
        ]  # 5th: all
        assert [row.tokens_after for row in handle.report().rows if row.merged] == [*counts, 256]

    @pytest.mark.parametrize(
        ("how", "graphs"), [("wrapped", 1), ("block by block", 4)]
    )  # three merged blocks, and the middle one
    def test_depth_is_compiled(self, how, graphs):
        torch._dynamo.reset()
        eager, unet, backend = small_unet(), small_unet(), Backend()
        handle = apply_patch(unet, "tome-sd", keep_rate=Depth(0.7))
        apply_patch(eager, "tome-sd", keep_rate=Depth(0.7))
        module = compiled(unet, how, backend)
        for timestep in (900, 500):
            got, expected = (call_unet(m, timestep=timestep) for m in (module, eager))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert len({row.tokens_after for row in handle.report().rows if row.merged}) == 3
        assert backend.graphs == graphs

    def test_levels_by_number(self):
        unet, spy = tiny_unet(), SpyMethod()
        owner = Owner(unet)
        handle = apply_patch(owner, spy, keep_rate={2: 0.5, 0: Linear(0.9, 0.6)})
        call_unet(unet, timestep=999)
        by_grid = {call.grid: call.num_clusters for call in spy.calls}
        assert by_grid == {Grid(16, 16): clusters_to_keep(256, 0.9), Grid(4, 4): 8}
        report = handle.report()
        assert {row.level for row in report.rows if row.merged} == {0, 2}
        assert "keep rate 0=linear:first=0.9,last=0.6,stages=5,2=0.5" in report.title

    def test_strings_are_taken_as_they_are_written(self):
        unet, again = tiny_unet(), tiny_unet()
        apply_patch(unet, "tome-sd", keep_rate={0: Depth(0.7), 1: 0.5})
        apply_patch(again, "tome-sd", keep_rate="0=depth:rate=0.7,1=0.5")
        assert torch.equal(call_unet(again), call_unet(unet))

    def test_title_of_a_single_one(self):
        title = apply_patch(tiny_unet(), keep_rate="depth:rate=0.7").report().title
        assert title == "atc, keep rate depth:rate=0.7"

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"keep_rate": {}}, ValueError, "must name at least one level"),
            ({"keep_rate": {7: 0.5}}, ValueError, "are 0, 1, 2, 3, got 7"),
            ({"keep_rate": {-1: 0.5}}, ValueError, "levels of at least 0, got -1"),
            ({"keep_rate": {"0": 0.5}}, TypeError, "integers as levels, got '0'"),
            ({"keep_rate": {0: 0.5}, "levels": 1}, ValueError, "`levels` must be left out"),
            ({"keep_rate": "0=0.5", "levels": 1}, ValueError, "`levels` must be left out"),
            ({"keep_rate": "7=0.5"}, ValueError, "are 0, 1, 2, 3, got 7"),
            ({"keep_rate": {0: 1.5}}, ValueError, r"`keep_rate` must be in \(0, 1\], got 1.5"),
            (
                {"keep_rate": Depth(0.7), "share_layers": True},
                ValueError,
                "`share_layers` must be False",
            ),
            (
                {"method": "tome", "keep_rate": Linear(1.0, 0.3)},
                ValueError,
                r"a keep rate of at least 0.5\), got",
            ),
            ({"method": "tome", "keep_rate": {1: 0.5, 2: 0.4}}, ValueError, "on a 4x4 grid"),
        ],
        ids=str,
    )
    def test_bad_ones_are_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            apply_patch(Owner(tiny_unet()), **options)
