from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.manifest import read_manifest, write_manifest
from sd_tokenmerge.sweep.plan import SweepPlan, plan_sweep


def test_a_new_sweep_has_everything_to_do_and_no_idea_of_the_time(make_sweep):
    options = make_sweep()
    plan = plan_sweep(options)
    assert [str(run.setting) for run in plan.runs] == [
        "unmerged",
        "tome-sd, 70 %",
        "tome-sd, 50 %",
        "random, 70 %",
        "random, 50 %",
    ]
    assert plan.num_missing == 10
    assert plan.total_seconds_left is None
    assert not Path(options.out).exists()


def test_time_is_estimated_from_the_runs_own_images_else_from_the_others(finished, make_sweep):
    options = make_sweep()
    runs = Path(options.out) / "runs"
    for name, seconds in (("unmerged", 4.0), ("tome-sd_keep-0.7", 2.0)):
        records = read_manifest(runs / name)
        path = runs / name / "manifest.jsonl"
        write_manifest(path, [type(r)(**vars(r) | {"seconds": seconds}) for r in records])
    (runs / "tome-sd_keep-0.7" / "3_0.png").unlink()
    for name in ("tome-sd_keep-0.5", "random_keep-0.7", "random_keep-0.5"):
        shutil.rmtree(runs / name)
    plan = plan_sweep(options)
    assert [run.num_missing for run in plan.runs] == [0, 1, 2, 2, 2]
    left = [plan.seconds_left(run) for run in plan.runs]
    assert left == [0.0, 2.0, 6.0, 6.0, 6.0], "own median, or the median of 4 and 2 s"
    assert plan.total_seconds_left == 20.0


def test_nothing_is_left_after_the_sweep(finished):
    options = finished
    plan = plan_sweep(options)
    assert (plan.num_missing, plan.total_seconds_left) == (0, 0.0)


def test_a_run_that_would_be_replaced_has_everything_to_do(finished, make_sweep):
    other = make_sweep({"merging": MergeConfig(seed=7)}, methods=("random",), keep_rates=(0.5,))
    with pytest.raises(ValueError, match="merge_seed: 0 -> 7"):
        plan_sweep(other)
    plan = plan_sweep(other, overwrite=True)
    assert [run.is_replaced for run in plan.runs] == [False, True]
    assert [run.num_missing for run in plan.runs] == [0, 2]
    assert isinstance(plan, SweepPlan)


def test_only_run_folders_may_be_there_before(finished):
    """Runs that `generate` made by shards are taken over."""
    options = finished
    for path in Path(options.out).iterdir():
        if path.is_file():
            path.unlink()
    assert plan_sweep(options).num_missing == 0
