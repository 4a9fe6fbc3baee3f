"""Two versions side by side: what a worker does, and how the two are compared."""

from __future__ import annotations

import argparse

import pytest
import torch
from benchmarks import against, worker
from benchmarks.rows import ROOT, append_rows

from sd_tokenmerge.bench.turns import Cost

TOKENS = {"batch": 2, "grid": 8, "channels": 4, "kind": "white"}


def test_partitions_are_equal_whatever_the_numbers_of_clusters():
    labels = torch.tensor([[0, 1, 1, 2], [2, 0, 1, 0]])
    renamed = torch.tensor([[2, 0, 0, 1], [0, 1, 2, 1]])
    other = torch.tensor([[0, 1, 1, 2], [2, 0, 1, 1]])
    assert worker.digest(labels) == worker.digest(renamed) != worker.digest(other)


@pytest.mark.parametrize("benchmark", ["unet-step", "self-attention-step"])
def test_a_worker_times_a_preset(benchmark):
    run, facts = worker.PREPARE[benchmark](name="preset-balanced", case="quick", batch=1)
    assert run().wall > 0
    assert facts == {}


def test_a_worker_answers_in_a_process_of_its_own():
    process = against.Worker(ROOT, threads=1)
    case = against.Case("clustering", "tokens", "atc:linkage=single", {"case": TOKENS})
    try:
        labels = process.ask(case.request())["labels"]
        cost = process.run()
    finally:
        process.stop()
    assert labels == worker.prepare_clustering(case.contestant, TOKENS)[1]["labels"]
    assert cost.wall > 0
    assert cost.cpu > 0


def test_a_worker_that_fails_ends_the_run(capfd):
    process = against.Worker(ROOT, threads=1)
    try:
        with pytest.raises(SystemExit, match="a worker ended unexpectedly"):
            process.ask({"do": "run"})
    finally:
        process.stop()
    assert "prepare a case before running it." in capfd.readouterr().err


def test_an_unknown_commit_is_refused():
    with (
        pytest.raises(SystemExit, match="--against must be a commit of this repository, got 'no"),
        against.checkout("no-such-commit"),
    ):
        pass


class FixedWorker:
    def __init__(self, labels, wall, cpu):
        self.labels, self.cost = labels, Cost(wall, cpu)

    def ask(self, request):
        return {"labels": self.labels}

    def run(self):
        return self.cost


@pytest.mark.parametrize(("labels", "same"), [("a", "1 of 1"), ("b", "0 of 1")])
def test_both_versions_have_rows_and_a_ratio(tmp_path, labels, same):
    case = against.Case("clustering", "2 x 64 x 4", "atc:linkage=single", {})
    workers = [FixedWorker(labels, 0.3, 0.3), FixedWorker("a", 0.2, 0.6)]
    rows = against.measure(case, workers, ("new", "old"), 0, 5)
    assert [(row["commit"], row["against"]) for row in rows] == [("old", ""), ("new", "old")]
    append_rows(tmp_path / "against.csv", against.COLUMNS, rows)
    text = against.comparisons(tmp_path)
    assert "|  |  | old, ms (20 to 80 %) | new, ms | ratio | ratio of CPU times |" in text
    times = "200.0 (200.0 to 200.0) | 300.0 (300.0 to 300.0) | 1.500 (1.500 to 1.500) | 0.500"
    assert f"| atc:linkage=single | 2 x 64 x 4 | {times} |" in text
    assert f"the same partition in {same} cases" in text


@pytest.mark.slow
def test_this_tree_against_its_own_commit(tmp_path):
    arguments = argparse.Namespace(
        against="HEAD", device="cpu", minutes=0, rounds=1, quick=False, out=tmp_path
    )
    cases = [against.Case("clustering", "tokens", "atc", {"case": TOKENS})]
    text = against.run(cases, arguments)
    assert "the same partition in 1 of 1 cases" in text
    assert text == against.comparisons(tmp_path)
