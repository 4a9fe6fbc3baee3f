"""The overhead of `generate`: known delays must show where they are.

No real time decides: the clocks of the code under test stand still but for what a test adds.
"""

from __future__ import annotations

import threading

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
STEP_S = 1.0
STEPS = 6


class StoppedTime:
    """Stands for the time module."""

    def __init__(self):
        self._lock = threading.Lock()
        self._wall_s = self._cpu_s = 1000.0

    def sleep(self, seconds):
        self._pass(seconds, 0)

    def work(self, seconds):
        """Keep a processor busy, beside others."""
        self._pass(0, seconds)

    def step(self, seconds):
        """Compute, with everyone waiting."""
        self._pass(seconds, seconds)

    def _pass(self, wall_s, cpu_s):
        with self._lock:
            self._wall_s += wall_s
            self._cpu_s += cpu_s

    def perf_counter(self):
        return self._wall_s

    def process_time(self):
        return self._cpu_s


@pytest.fixture
def time(monkeypatch):
    stopped = StoppedTime()
    for module in (bench_generate, paired_calls, run_module):
        monkeypatch.setattr(module, "time", stopped)
    return stopped


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
def pipe(options, time, monkeypatch):
    """Each of its steps takes a second."""
    pipe = load_pipeline(options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as many steps as asked
    step = pipe.scheduler.step

    def timed(*arguments, **keywords):
        time.step(STEP_S)
        return step(*arguments, **keywords)

    monkeypatch.setattr(pipe.scheduler, "step", timed)
    return pipe


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


def test_a_delay_between_calls_is_seen(options, pipe, time, monkeypatch):
    delayed(monkeypatch, run_module.Sampler, "__call__", time.sleep)
    pairs = calls_in_pairs(pipe, options)
    assert median_overhead(pairs, "wall_s") == pytest.approx(DELAY_S)
    assert median_overhead(pairs, "cpu_s") == pytest.approx(0)
    between_s, run_s, _ = bench_generate.between_calls(pipe, paired_calls.of_batches(options, 4))
    assert between_s == pytest.approx(4 * DELAY_S)
    assert run_s == pytest.approx(4 * (DELAY_S + STEPS * STEP_S))


def test_work_of_the_storing_threads_is_seen(options, pipe, time, monkeypatch):
    delayed(monkeypatch, ImageWriter, "_store", time.work)
    pairs = calls_in_pairs(pipe, options)
    assert median_overhead(pairs, "cpu_s") == pytest.approx(DELAY_S)


def test_a_row(options, pipe, time, monkeypatch):
    delayed(monkeypatch, run_module.Sampler, "__call__", time.sleep)
    row = bench_generate.measure(pipe, options, limit_s=0.0)
    assert (row["pixels"], row["steps"], row["batch"], row["pairs"]) == ("32x32", STEPS, 1, 9)
    assert row["bare `pipe(...)`: s/image"] == pytest.approx(STEPS * STEP_S)
    assert row["overhead"] == "+3.33 ± 0.00 %"
    assert row["per image"] == "+200.00 ± 0.00 ms"
    assert row["in CPU time"] == "+0.00 ± 0.00 %"
    assert row["between calls"] == "3.23 %"


def test_storing_that_lasts_into_the_steps_is_seen_as_a_whole(options, pipe, time, monkeypatch):
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
        time.work(seconds)

    monkeypatch.setattr(paired_calls.Clock, "set", call_begins)
    monkeypatch.setattr(paired_calls.Clock, "tick", step_ends)
    monkeypatch.setattr(paired_calls.HeldWriter, "close", run_ends)
    delayed(monkeypatch, ImageWriter, "_store", work_after_the_fourth_step)
    pairs = calls_in_pairs(pipe, options)
    assert all(run.settled >= 5 for _, run in pairs)
    assert median_overhead(pairs, "cpu_s") == pytest.approx(DELAY_S)


def test_what_delays_steps_in_the_middle_is_left_out(options, pipe, time, monkeypatch):
    step = pipe.scheduler.step
    release = paired_calls.HeldWriter.release
    number = 0

    def store_at_once(writer):
        release(writer)
        writer.settle()

    def slower(*arguments, **keywords):
        nonlocal number
        number += 1
        if number % STEPS == 4 and number // STEPS % 2:  # bare calls and others in turns
            time.sleep(DELAY_S)
        return step(*arguments, **keywords)

    monkeypatch.setattr(pipe.scheduler, "step", slower)
    monkeypatch.setattr(paired_calls.HeldWriter, "release", store_at_once)
    pairs = calls_in_pairs(pipe, options)
    assert median_overhead(pairs, "wall_s") == pytest.approx(0)
    differences = [abs(run.whole.wall_s - bare.whole.wall_s) for bare, run in pairs]
    assert differences == pytest.approx([DELAY_S] * len(pairs))


def test_mean_of_the_middle_half_and_its_error():
    assert bench_generate.typical([2.0] * 9, "%") == "+2.00 ± 0.00 %"
    assert bench_generate.typical([-4.0] * 7 + [1000.0], "ms").startswith("-4.00 ± ")
    noisy = [i % 3 for i in range(99)]
    assert bench_generate.typical(noisy, "%").startswith("+1.00 ± 0.")
