"""The overhead of `generate`: known delays must show where they are."""

from __future__ import annotations

import time

import bench_generate
import pytest

from sd_tokenmerge.sampling import run as run_module
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.writer import ImageWriter

DELAY_S = 0.05


@pytest.fixture
def options(tiny_model, tmp_path):
    return resolve_options(
        GenerateOptions(
            out=str(tmp_path / "run"),
            model=str(tiny_model),
            classes=(0,),
            height=32,
            width=32,
            steps=2,
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
    values = sorted(getattr(run, field) - getattr(bare, field) for bare, run in pairs)
    return values[len(values) // 2]


def test_calls_alternate_and_every_batch_is_paired(options, pipe, monkeypatch):
    order = []
    bare = bench_generate.call_bare

    def noted(pipe, options, batch):
        order.append("bare")
        bare(pipe, options, batch)

    monkeypatch.setattr(bench_generate, "call_bare", noted)
    delayed(monkeypatch, run_module.Sampler, "__call__", lambda _: order.append("run"))
    pairs = bench_generate.paired_costs(pipe, bench_generate.of_batches(options, 6))
    expected = "bare run run bare bare run run bare bare run run bare"
    assert order == expected.split()
    assert len(pairs) == 5


def test_a_delay_between_calls_is_seen(options, pipe, monkeypatch):
    delayed(monkeypatch, run_module.Sampler, "__call__", time.sleep)
    pairs = bench_generate.paired_costs(pipe, bench_generate.of_batches(options, 6))
    assert median_overhead(pairs, "wall_s") > 0.8 * DELAY_S
    between_s, run_s, _ = bench_generate.between_calls(pipe, bench_generate.of_batches(options, 4))
    assert 4 * DELAY_S < between_s < run_s


def test_work_of_the_storing_threads_is_seen(options, pipe, monkeypatch):
    delayed(monkeypatch, ImageWriter, "_store", work)
    pairs = bench_generate.paired_costs(pipe, bench_generate.of_batches(options, 6))
    assert median_overhead(pairs, "cpu_s") > 0.8 * DELAY_S


def test_a_row(options, pipe):
    row = bench_generate.measure(pipe, options, limit_s=0.0)
    assert (row["pixels"], row["steps"], row["batch"], row["pairs"]) == ("32x32", 2, 1, 5)
    assert row["overhead"].endswith(" %")
    assert row["per image"].endswith(" ms")


def test_median_and_error():
    assert bench_generate.overhead([1.02] * 9, "%") == "+2.0 ± 0.0 %"
    assert bench_generate.overhead([-0.004] * 9, "ms") == "-4.0 ± 0.0 ms"
    noisy = [1 + 0.01 * (i % 3) for i in range(99)]
    low = bench_generate.overhead(noisy, "%")
    assert low.startswith("+1.0 ± 0.")
