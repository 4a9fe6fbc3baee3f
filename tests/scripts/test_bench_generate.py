"""The overhead of `generate`: known delays must show where they are."""

from __future__ import annotations

import threading
import time

import bench_generate
import paired_calls
import pytest
from diffusers import DDIMScheduler

from sd_tokenmerge.sampling import run as run_module
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.writer import ImageWriter

DELAY_S = 0.2
STEPS = 6


@pytest.fixture
def options(tiny_model, tmp_path):
    return resolve_options(
        GenerateOptions(
            out=str(tmp_path / "run"),
            model=str(tiny_model),
            classes=(0,),
            height=32,
            width=32,
            steps=STEPS,
            method="none",
            device="cpu",
        )
    )


@pytest.fixture
def pipe(options):
    return load_pipeline(options)


def work(seconds):
    """Keep a processor busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def delayed(monkeypatch, owner, name, delay):
    original = getattr(owner, name)

    def slower(self, *arguments):
        delay(DELAY_S)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, slower)


def median_overhead(pairs, field):
    values = sorted(
        getattr(run.without_middle(run.settled), field)
        - getattr(bare.without_middle(run.settled), field)
        for bare, run in pairs
    )
    return values[len(values) // 2]


def calls_in_pairs(pipe, options):
    return paired_calls.paired_calls(pipe, paired_calls.of_batches(options, 6))


def test_calls_alternate_and_every_batch_is_paired(options, pipe, monkeypatch):
    order = []
    bare = paired_calls.call_bare

    def noted(pipe, options, batch):
        order.append("bare")
        bare(pipe, options, batch)

    monkeypatch.setattr(paired_calls, "call_bare", noted)
    delayed(monkeypatch, run_module.Sampler, "__call__", lambda _: order.append("run"))
    pairs = calls_in_pairs(pipe, options)
    expected = "bare run run bare bare run run bare bare run run bare"
    assert order == expected.split()
    assert len(pairs) == 5


def test_a_delay_between_calls_is_seen(options, pipe, monkeypatch):
    delayed(monkeypatch, run_module.Sampler, "__call__", time.sleep)
    pairs = calls_in_pairs(pipe, options)
    assert median_overhead(pairs, "wall_s") > 0.8 * DELAY_S
    between_s, run_s, _ = bench_generate.between_calls(pipe, paired_calls.of_batches(options, 4))
    assert 4 * DELAY_S < between_s < run_s


def test_work_of_the_storing_threads_is_seen(options, pipe, monkeypatch):
    delayed(monkeypatch, ImageWriter, "_store", work)
    pairs = calls_in_pairs(pipe, options)
    assert median_overhead(pairs, "cpu_s") > 0.8 * DELAY_S


def test_a_row(options, pipe):
    row = bench_generate.measure(pipe, options, limit_s=0.0)
    assert (row["pixels"], row["steps"], row["batch"], row["pairs"]) == ("32x32", STEPS, 1, 9)
    assert row["overhead"].endswith(" %")
    assert row["per image"].endswith(" ms")


def test_storing_that_lasts_into_the_steps_is_seen_as_a_whole(options, pipe, monkeypatch):
    fourth_step = threading.Event()
    begin, tick = paired_calls.Clock.set, paired_calls.Clock.tick
    close = paired_calls.HeldWriter.close

    def call_begins(clock):
        fourth_step.clear()
        begin(clock)

    def step_ends(clock, storing):
        tick(clock, storing)
        if len(clock._call.steps) >= 4:
            fourth_step.set()

    def run_ends(writer):
        fourth_step.set()
        close(writer)

    def work_after_the_fourth_step(seconds):
        assert fourth_step.wait(60)
        work(seconds)

    monkeypatch.setattr(paired_calls.Clock, "set", call_begins)
    monkeypatch.setattr(paired_calls.Clock, "tick", step_ends)
    monkeypatch.setattr(paired_calls.HeldWriter, "close", run_ends)
    delayed(monkeypatch, ImageWriter, "_store", work_after_the_fourth_step)
    pairs = calls_in_pairs(pipe, options)
    assert all(run.settled >= 5 for _, run in pairs)
    assert median_overhead(pairs, "cpu_s") > 0.8 * DELAY_S


def test_what_delays_steps_in_the_middle_is_left_out(options, pipe, monkeypatch):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as many steps as asked
    step = pipe.scheduler.step
    number = 0

    def slower(*arguments, **keywords):
        nonlocal number
        number += 1
        if number % STEPS == 4 and number // STEPS % 2:  # bare calls and others in turns
            time.sleep(DELAY_S)
        return step(*arguments, **keywords)

    monkeypatch.setattr(pipe.scheduler, "step", slower)
    pairs = calls_in_pairs(pipe, options)
    assert abs(median_overhead(pairs, "wall_s")) < 0.5 * DELAY_S
    assert max(abs(run.whole.wall_s - bare.whole.wall_s) for bare, run in pairs) > 0.8 * DELAY_S


def test_mean_of_the_middle_half_and_its_error():
    assert bench_generate.typical([2.0] * 9, "%") == "+2.00 ± 0.00 %"
    assert bench_generate.typical([-4.0] * 7 + [1000.0], "ms").startswith("-4.00 ± ")
    noisy = [i % 3 for i in range(99)]
    assert bench_generate.typical(noisy, "%").startswith("+1.00 ± 0.")
