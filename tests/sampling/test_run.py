from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.patching.patch import find_patch
from sd_tokenmerge.sampling import run as run_module
from sd_tokenmerge.sampling.description import RUN_FILE
from sd_tokenmerge.sampling.lock import lock_folder
from sd_tokenmerge.sampling.manifest import MANIFEST, read_manifest
from sd_tokenmerge.sampling.run import NotANumberError, RunStopped, generate
from sd_tokenmerge.sampling.status import run_status
from tests.sampling.conftest import MakeOptions

ALL = [f"{c}_{i}.png" for c in range(3) for i in range(2)]


def images(folder: str | Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).glob("*.png"))
    }


class RecordedProgress:
    """Keeps what a run tells; calls back after each batch."""

    def __init__(self, after_batch: Any = None):
        self.notes: list[str] = []
        self.events: list[Any] = []
        self._after_batch = after_batch

    def start(self, total: int, done: int) -> None:
        self.events.append((total, done))

    def update(self, generated: int) -> None:
        self.events.append(generated)
        if self._after_batch is not None:
            self._after_batch(generated)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def stopping(self) -> None:
        self.events.append("stopping")

    def stop(self) -> None:
        self.events.append("stop")


@pytest.fixture
def whole(make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path) -> Path:
    """An uninterrupted run in batches of 4."""
    folder = tmp_path / "whole"
    generate(make_options(out=str(folder), batch_size=4), pipe=tiny_pipe)
    return folder


def test_a_run_leaves_images_manifest_and_description(
    make_options: MakeOptions, tiny_pipe: Any, tiny_model: Path
) -> None:
    options = make_options(keep_rate=0.7, seed=40)
    progress = RecordedProgress()
    summary = generate(options, pipe=tiny_pipe, progress=progress)
    folder = Path(options.out)
    assert (summary.num_images, summary.already_there, summary.generated) == (6, 0, 6)
    assert summary.findings == ()
    assert summary.images_per_second > 0
    assert progress.events[0] == (6, 0)
    assert progress.events[1:] == [1, 2, 3, 4, 5, 6, "stop"]

    names = {path.name for path in folder.iterdir()}
    assert names == {*ALL, MANIFEST, RUN_FILE, ".lock"}
    records = read_manifest(folder)
    assert {record.file: record.sha256 for record in records} == images(folder)
    assert [record.seed for record in records] == [40, 41, 50, 51, 60, 61]
    assert len(set(images(folder).values())) == 6
    with Image.open(folder / "1_1.png") as picture:
        text = picture.info
    assert text == {
        "prompt": "A high quality photograph of a goldfish, Carassius auratus.",
        "seed": "51",
        "method": "tome-sd",
        "keep_rate": "0.7",
        "steps": "2",
        "guidance_scale": "7.5",
    }
    description = json.loads((folder / RUN_FILE).read_text())
    assert description["options"]["merging"]["keep_rate"] == "0.7"
    assert description["plan"]["num_images"] == 6
    assert description["device"]["type"] == "cpu"
    weights = tiny_model / "unet" / "diffusion_pytorch_model.safetensors"
    assert (
        description["model"]["pipeline"]["files"]["unet/diffusion_pytorch_model.safetensors"]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    assert {"torch", "diffusers", "sd-tokenmerge"} <= set(description["versions"])
    assert find_patch(tiny_pipe.unet) is None


def test_merging_changes_images_and_the_patch_is_as_asked(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    results = {}
    for method, keep_rate in [("none", None), ("tome-sd", 1.0), ("tome-sd", 0.5), ("random", 0.5)]:
        folder = tmp_path / f"{method}-{keep_rate}"
        options = make_options(out=str(folder), method=method, keep_rate=keep_rate)
        generate(options, pipe=tiny_pipe)
        results[method, keep_rate] = [record.sha256 for record in read_manifest(folder)]
    assert results["none", None] != results["tome-sd", 0.5] != results["random", 0.5]
    # keep rate 1 is recorded in the PNG text, so compare pixels
    plain, kept = tmp_path / "none-None", tmp_path / "tome-sd-1.0"
    for name in ALL:
        assert Image.open(plain / name).tobytes() == Image.open(kept / name).tobytes()


def test_a_repeated_run_is_bit_identical(
    make_options: MakeOptions, whole: Path, tiny_model: Path, tmp_path: Path
) -> None:
    generate(make_options(out=str(tmp_path / "again"), batch_size=4))  # loads its own pipeline
    assert images(tmp_path / "again") == images(whole)


@pytest.mark.parametrize("method", ["none", "random", "tome-sd:random=true", "atc"])
def test_batch_size_changes_images_by_rounding_only(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path, method: str
) -> None:
    pixels = []
    for batch_size in (1, 4):
        folder = tmp_path / str(batch_size)
        options = make_options(out=str(folder), method=method, batch_size=batch_size)
        generate(options, pipe=tiny_pipe)
        pixels.append(np.stack([np.asarray(Image.open(folder / name), int) for name in ALL]))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # of 255: rounding at the edge of a level
    assert np.abs(pixels[0][0] - pixels[0][1]).mean() > 5


def test_a_complete_run_is_left_alone_and_needs_no_model(
    make_options: MakeOptions, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_pipeline", None)
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.png")}
    summary = generate(make_options(out=str(whole)))
    assert (summary.already_there, summary.generated) == (6, 0)
    assert summary.images_per_second == 0
    assert {path.name: path.stat().st_mtime_ns for path in whole.glob("*.png")} == before


def test_every_kind_of_damage_is_found_reported_and_repaired(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any
) -> None:
    expected = images(whole)
    (whole / "0_0.png").unlink()
    (whole / "0_1.png").write_bytes(b"")
    (whole / "1_0.png").write_bytes((whole / "1_1.png").read_bytes())
    (whole / ".2_0.png.tmp").write_bytes(b"half of an ima")
    manifest = whole / MANIFEST
    lines = manifest.read_text().splitlines(keepends=True)
    lines[3] = "garbage\n"  # 1_1.png
    manifest.write_text("".join(lines)[:-20])  # 2_1.png

    progress = RecordedProgress()
    options = make_options(out=str(whole), batch_size=4)
    summary = generate(options, pipe=tiny_pipe, progress=progress)
    assert (summary.already_there, summary.generated) == (1, 5)
    assert summary.findings == (
        "1 x recorded image that is not there: 0_0.png",
        "2 x image with another content than recorded: 0_1.png, 1_0.png",
        "2 x image without a record: 1_1.png, 2_1.png",
        "2 x manifest line that is not a record: manifest.jsonl, line 4, manifest.jsonl, line 6",
    )
    assert progress.notes == [f"Found {finding}" for finding in summary.findings]
    assert images(whole) == expected
    assert [record.sha256 for record in read_manifest(whole)] == list(expected.values())
    assert not (whole / ".2_0.png.tmp").exists()
    assert run_status(whole).is_complete


def test_a_resumed_run_keeps_its_batches(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images(whole)
    (whole / "0_1.png").unlink()
    sizes = []
    call = run_module.Sampler.__call__

    def counted(self: Any, jobs: Sequence[Any]) -> Any:
        sizes.append(len(jobs))
        return call(self, jobs)

    monkeypatch.setattr(run_module.Sampler, "__call__", counted)
    others = {name: (whole / name).stat().st_mtime_ns for name in ALL if name != "0_1.png"}
    summary = generate(make_options(out=str(whole), batch_size=4), pipe=tiny_pipe)
    assert (sizes, summary.generated) == ([4], 1)
    assert images(whole) == expected
    assert {name: (whole / name).stat().st_mtime_ns for name in others} == others


def test_shards_make_the_same_images_as_the_whole(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "a", tmp_path / "b"
    generate(make_options(out=str(whole), batch_size=2), pipe=tiny_pipe)
    for shard, count in (("2/3", 1), ("1/3", 2), ("3/3", 3)):
        options = make_options(out=str(parts), batch_size=2, shard=shard)
        summary = generate(options, pipe=tiny_pipe)
        assert (summary.num_images, summary.generated) == (2, 2)
        assert len(images(parts)) == len(read_manifest(parts)) == 2 * count
    assert images(parts) == images(whole)
    assert [path.name for path in parts.glob("manifest*")] == [MANIFEST]  # the last one unites
    assert run_status(parts).is_complete


def test_a_whole_run_takes_over_what_shards_left(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    generate(make_options(batch_size=2, shard="2/3"), pipe=tiny_pipe)
    assert not (folder / MANIFEST).exists()
    summary = generate(make_options(batch_size=2), pipe=tiny_pipe)
    assert (summary.already_there, summary.generated) == (2, 4)
    assert [path.name for path in folder.glob("manifest*")] == [MANIFEST]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"steps": 3}, "steps: 2 -> 3"),
        ({"method": "random", "keep_rate": 0.3}, 'method: "tome-sd" -> "random"; keep_rate: "0.5"'),
        ({"method": "none"}, 'method: "tome-sd" -> "none".'),
        ({"classes": (0, 1)}, 'classes: "0-2" -> "0-1"'),
        ({"seed": 1, "scheduler": "DDIM"}, 'seed: 0 -> 1; scheduler: null -> "DDIM"'),
        ({"dtype": "bfloat16"}, 'dtype: "float32" -> "bfloat16"'),
    ],
)
def test_other_options_in_the_same_folder_are_refused_with_a_diff(
    make_options: MakeOptions, whole: Path, changes: dict[str, Any], difference: str
) -> None:
    before = images(whole)
    with pytest.raises(ValueError, match="`out` must be a new folder or hold a run") as caught:
        generate(make_options(out=str(whole), **changes))
    assert difference in str(caught.value)
    assert images(whole) == before


def test_a_method_in_other_words_is_the_same(make_options: MakeOptions, tiny_pipe: Any) -> None:
    generate(make_options(method="atc"), pipe=tiny_pipe)
    assert generate(make_options(method="atc:linkage=average"), pipe=tiny_pipe).generated == 0


def test_options_are_compared_again_under_the_lock(
    make_options: MakeOptions, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if another process had written its run.json after the first look.
    generate(make_options(), pipe=tiny_pipe)
    monkeypatch.setattr(run_module, "check_folder", lambda *arguments: None)
    with pytest.raises(ValueError, match="steps: 2 -> 3"):
        generate(make_options(steps=3), pipe=tiny_pipe)


def test_another_model_under_the_same_name_is_refused(
    make_options: MakeOptions, tiny_model: Path, tiny_pipe: Any, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    options = make_options(model=str(copy))
    generate(options, pipe=tiny_pipe)
    moved = copy.rename(tmp_path / "moved")
    summary = generate(make_options(model=str(moved)), pipe=tiny_pipe)
    assert summary.generated == 0  # the same content elsewhere is the same model

    config = json.loads((moved / "scheduler" / "scheduler_config.json").read_text())
    config["beta_end"] = 0.013
    (moved / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model: other content"):
        generate(make_options(model=str(moved)), pipe=tiny_pipe)


def test_other_prompts_under_the_same_name_are_refused(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\n")
    options = make_options(classes=None, prompts=str(path), images_per_class=1)
    generate(options, pipe=tiny_pipe)
    assert [record.prompt for record in read_manifest(options.out)] == ["a", "b"]
    path.write_text("a\nc\n")
    with pytest.raises(ValueError, match="prompts: other content"):
        generate(options, pipe=tiny_pipe)


def test_overwrite_replaces_the_run_and_nothing_else(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any
) -> None:
    (whole / "notes.md").write_text("mine")
    options = make_options(out=str(whole), classes=(5,), method="none")
    generate(options, pipe=tiny_pipe, overwrite=True)
    assert set(images(whole)) == {"5_0.png", "5_1.png"}
    assert [record.class_index for record in read_manifest(whole)] == [5, 5]
    assert (whole / "notes.md").read_text() == "mine"
    with pytest.raises(ValueError, match="`overwrite` must be off with `shard`"):
        generate(make_options(out=str(whole), shard="1/2"), pipe=tiny_pipe, overwrite=True)


def test_a_folder_with_other_things_is_refused(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"with 'cat\.png' in it"):
            generate(make_options(out=str(tmp_path)), pipe=tiny_pipe, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["cat.png"]


def test_pictures_that_are_no_part_of_the_run_are_reported_and_kept(
    make_options: MakeOptions, whole: Path
) -> None:
    (whole / "cat.png").write_bytes(b"cat")
    summary = generate(make_options(out=str(whole)))
    assert summary.findings == ("1 x picture that is not part of the run: cat.png",)
    assert (whole / "cat.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rate": 0.2}, "a keep rate of at least 0.25"),
        ({"method": "foo"}, "`method` must be one of"),
        ({"method": "tome-sd:stride=x"}, "stride must be"),
        ({"levels": 9}, "`levels` must be in"),
        ({"model": "/nowhere"}, "`model` must exist"),
        ({"seed": 2**63 - 1}, "`base` must leave seeds below"),
        ({"classes": None, "prompts": "/nowhere.txt"}, "No such file"),
    ],
)
def test_bad_input_leaves_no_folder(
    make_options: MakeOptions, changes: dict[str, Any], message: str
) -> None:
    options = make_options(**changes)
    with pytest.raises((ValueError, OSError), match=message):
        generate(options)
    assert not Path(options.out).exists()


def test_a_method_must_reach_the_keep_rate_at_the_runs_own_size(
    make_options: MakeOptions, tiny_pipe: Any
) -> None:
    options = make_options(method="tome-sd:stride=4", height=24, width=24)
    with pytest.raises(ValueError, match=r"must be in \[9, 9\] for tome-sd:stride=4 on a 3x3 grid"):
        generate(options, pipe=tiny_pipe)
    assert not Path(options.out).exists()
    generate(make_options(method="tome-sd:stride=4"), pipe=tiny_pipe)


def test_a_folder_in_use_is_refused(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with (
        lock_folder(tmp_path / "run"),
        pytest.raises(ValueError, match="another process is generating"),
    ):
        generate(make_options(), pipe=tiny_pipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_batch_and_it_can_go_on(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any, number: int
) -> None:
    def interrupt(done: int) -> None:
        if done == 4:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    options = make_options(batch_size=4)
    progress = RecordedProgress(interrupt)
    with pytest.raises(RunStopped, match=r"4 of 6 images are done\. Run the same command again"):
        generate(options, pipe=tiny_pipe, progress=progress)
    assert progress.events == [(6, 0), 4, "stopping", "stop"]
    assert signal.getsignal(number) is handler
    assert find_patch(tiny_pipe.unet) is None
    status = run_status(options.out)
    assert (status.done, status.missing, status.broken, status.findings) == (4, 2, 0, ())

    summary = generate(options, pipe=tiny_pipe)
    assert (summary.already_there, summary.generated) == (4, 2)
    assert images(options.out) == images(whole)


def test_a_signal_during_the_last_batch_is_not_lost(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any
) -> None:
    def interrupt(done: int) -> None:
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    options = make_options(batch_size=4)
    with pytest.raises(RunStopped, match="after the last batch: all 6 images are done"):
        generate(options, pipe=tiny_pipe, progress=RecordedProgress(interrupt))
    assert run_status(options.out).done == 6
    assert images(options.out) == images(whole)


def test_an_error_of_the_pipeline_keeps_what_is_done(
    make_options: MakeOptions, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = run_module.Sampler.__call__

    def failing(self: Any, jobs: Sequence[Any]) -> Any:
        if jobs[0].class_index == 2:
            raise RuntimeError("out of memory")
        return call(self, jobs)

    options = make_options()
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Sampler, "__call__", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(options, pipe=tiny_pipe)
    assert run_status(options.out).done == 4
    assert find_patch(tiny_pipe.unet) is None
    assert generate(options, pipe=tiny_pipe).generated == 2


def test_images_with_nan_pixels_are_reported_and_not_stored(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = run_module.Sampler.__call__

    def overflowing(self: Any, jobs: Sequence[Any]) -> Any:
        batch = call(self, jobs)
        for job, pixels in zip(jobs, batch.pixels, strict=True):
            if job.class_index == 1:
                pixels[3, 5, 1] = np.nan
        return batch

    options = make_options(batch_size=4)
    progress = RecordedProgress()
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Sampler, "__call__", overflowing)
        with pytest.raises(NotANumberError, match=r"2 of 6 images have NaN.*: 1_0\.png, 1_1\.png"):
            generate(options, pipe=tiny_pipe, progress=progress)
    assert progress.notes == [f"1_{i}.png has NaN pixels and is not stored." for i in range(2)]
    assert find_patch(tiny_pipe.unet) is None
    status = run_status(options.out)
    assert (status.done, status.missing, status.findings) == (4, 2, ())
    assert generate(options, pipe=tiny_pipe).generated == 2
    assert images(options.out) == images(whole)


def test_a_folder_that_shows_up_late_is_waited_for(
    make_options: MakeOptions, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a network file system shows it to another machine than the one that wrote run.json.
    exists, looks = Path.exists, []

    def late(path: Path, **arguments: Any) -> bool:
        found = exists(path, **arguments)
        if path.name != RUN_FILE or not found:
            return found
        looks.append(path)
        return len(looks) > 2

    monkeypatch.setattr(Path, "exists", late)
    assert generate(make_options(), pipe=tiny_pipe).generated == 6
    looks.clear()
    monkeypatch.setattr(run_module, "_SHARED_FOLDER_TIMEOUT_S", 0.0)
    with pytest.raises(ValueError, match="`out` must be a folder that all processes share"):
        generate(make_options(out=make_options().out + "2"), pipe=tiny_pipe)


def test_an_option_that_a_run_does_not_know_has_its_default(
    make_options: MakeOptions, whole: Path
) -> None:
    description = json.loads((whole / RUN_FILE).read_text())
    del description["options"]["offload"], description["options"]["merging"]["features"]
    (whole / RUN_FILE).write_text(json.dumps(description))
    assert generate(make_options(out=str(whole))).generated == 0
    with pytest.raises(ValueError, match='features: "input" -> "keys"'):
        generate(make_options(out=str(whole), features="keys"))


def test_a_run_without_images_does_not_stand_in_the_way(
    make_options: MakeOptions, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Sampler, "__call__", lambda self, jobs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(make_options(steps=3), pipe=tiny_pipe)
    assert generate(make_options(steps=2), pipe=tiny_pipe).generated == 6
    with pytest.raises(ValueError, match="steps: 2 -> 3"):
        generate(make_options(steps=3), pipe=tiny_pipe)


def test_a_lost_description_can_be_replaced(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any
) -> None:
    expected = images(whole)
    (whole / RUN_FILE).unlink()
    options = make_options(out=str(whole), batch_size=4)
    with pytest.raises(ValueError, match=r"`out` must hold a run\.json beside its images"):
        generate(options, pipe=tiny_pipe)
    assert images(whole) == expected
    assert generate(options, pipe=tiny_pipe, overwrite=True).generated == 6
    assert images(whole) == expected


def test_a_folder_in_place_of_an_image_is_refused_by_name(
    make_options: MakeOptions, whole: Path, tiny_pipe: Any
) -> None:
    (whole / "1_0.png").unlink()
    (whole / "1_0.png").mkdir()
    assert run_status(whole).findings == ("1 x image with another content than recorded: 1_0.png",)
    with pytest.raises(IsADirectoryError, match=r"1_0\.png"):
        generate(make_options(out=str(whole)), pipe=tiny_pipe)


def test_other_versions_are_noted(make_options: MakeOptions, whole: Path) -> None:
    description = json.loads((whole / RUN_FILE).read_text())
    description["versions"]["torch"] = "1.0"
    (whole / RUN_FILE).write_text(json.dumps(description))
    progress = RecordedProgress()
    generate(make_options(out=str(whole)), progress=progress)
    assert "torch 1.0 -> " in progress.notes[0]


def cut_off(text: str) -> str:
    return text[: len(text) // 2]


def without(part: str, name: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        description = json.loads(text)
        del description[part][name]
        return json.dumps(description)

    return change


def changed(name: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | {name: value})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: "", "is damaged (empty)"),
        (lambda text: " \n", "is damaged (empty)"),
        (cut_off, "is damaged (not valid JSON: "),
        (lambda text: "[]", "is damaged (no JSON object)"),
        (lambda text: '{"format": 2, "options": 3}', "is damaged (without model)"),
        (without("plan", "sha256"), "is damaged (without sha256)"),
        (without("model", "pipeline"), "is damaged (without pipeline)"),
        (changed("versions", {}), "is damaged (without sd-tokenmerge)"),
        (changed("commit", ["a"]), "is damaged (hashes, versions and the like must be texts"),
        (changed("created", 5), "is damaged (hashes, versions and the like must be texts"),
        (lambda text: '{"format": 99}', "was written by another version (of format 99, where"),
    ],
)
def test_a_damaged_description_is_refused_or_replaced(
    make_options: MakeOptions,
    whole: Path,
    tiny_pipe: Any,
    damage: Callable[[str], str],
    problem: str,
) -> None:
    path = whole / RUN_FILE
    path.write_text(damage(path.read_text()))
    before = images(whole)
    for look in (lambda: generate(make_options(out=str(whole))), lambda: run_status(whole)):
        with pytest.raises(ValueError, match=re.escape(f"{path} {problem}")) as caught:
            look()
        assert "images beside it are untouched" in str(caught.value)
        assert "`overwrite` or in another `out`" in str(caught.value)
    assert images(whole) == before
    generate(make_options(out=str(whole), classes=(5,)), pipe=tiny_pipe, overwrite=True)
    assert set(images(whole)) == {"5_0.png", "5_1.png"}
    assert run_status(whole).is_complete
