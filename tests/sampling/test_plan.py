from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import ImageJob, plan_batches, plan_images, planned_files


def test_plan_follows_the_papers_protocol() -> None:
    jobs = plan_images(GenerateOptions(out="-", classes=(0, 12), seed=5))
    assert jobs == [
        ImageJob(0, 0, 5, "A high quality photograph of a tench, Tinca tinca."),
        ImageJob(0, 1, 6, "A high quality photograph of a tench, Tinca tinca."),
        ImageJob(12, 0, 125, jobs[2].prompt),
        ImageJob(12, 1, 126, jobs[2].prompt),
    ]
    assert jobs[2].prompt.startswith("A high quality photograph of a house finch, linnet")
    assert [job.file for job in jobs] == ["0_0.png", "0_1.png", "12_0.png", "12_1.png"]


def test_prompt_files_number_their_lines_and_count_seeds_up(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 70}\n{"prompt": "b"}\n')
    jobs = plan_images(GenerateOptions(out="-", prompts=str(path)))
    assert [tuple(job) for job in jobs] == [
        (0, 0, 70, "a"),
        (0, 1, 71, "a"),
        (1, 0, 10, "b"),
        (1, 1, 11, "b"),
    ]


def test_more_than_ten_images_per_class_need_hashed_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`images_per_class` must be at most 10.*got 11"):
        GenerateOptions(out="-", classes=(1,), images_per_class=11)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 70}\n')
    options = GenerateOptions(out="-", prompts=str(path), images_per_class=11)
    assert [job.seed for job in plan_images(options)] == list(range(70, 81))
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="use the hashed scheme"):
        plan_images(options)
    options = GenerateOptions(out="-", classes=(1,), images_per_class=11, seed_scheme="hashed")
    assert len({job.seed for job in plan_images(options)}) == 11


@given(
    total=st.integers(0, 40),
    batch_size=st.integers(1, 9),
    shards=st.integers(1, 12),
)
def test_shards_divide_the_batches_of_the_whole(total: int, batch_size: int, shards: int) -> None:
    jobs = [ImageJob(i, 0, i, "") for i in range(total)]
    whole = plan_batches(jobs, batch_size, 0, 1)
    parts = [plan_batches(jobs, batch_size, shard, shards) for shard in range(shards)]
    assert [batch for part in parts for batch in part] == whole
    assert [job for batch in whole for job in batch] == jobs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("per_class", [1, 3])
def test_names_are_known_without_the_prompt_file(tmp_path: Path, per_class: int) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    for options in (
        GenerateOptions(out="-", prompts=str(path), images_per_class=per_class),
        GenerateOptions(out="-", classes=(3, 500), images_per_class=per_class),
    ):
        jobs = plan_images(options)
        assert planned_files(options, len(jobs)) == [job.file for job in jobs]


def test_too_many_images_are_refused_at_once() -> None:
    options = GenerateOptions(
        out="-", classes=tuple(range(1000)), images_per_class=10**7, seed_scheme="hashed"
    )
    with pytest.raises(ValueError, match="`images_per_class` must give at most 1,000,000 images"):
        plan_images(options)
