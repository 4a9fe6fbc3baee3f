from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.sampling import writer as writer_module
from sd_tokenmerge.sampling.manifest import MANIFEST, intact_records, read_manifest
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.writer import ImageWriter, encode_png

JOBS = [ImageJob(i, 0, 10 * i, f"prompt {i}") for i in range(20)]


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((8, 16, 3), dtype=np.float32)


def test_images_and_records_are_stored(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path, tmp_path / MANIFEST, {"method": "atc"})
    for job in JOBS:
        writer.submit(job, pixels(job.class_index), 0.5, job.class_index == 3)
    writer.close()
    records = read_manifest(tmp_path)
    assert [record.job for record in records] == JOBS
    assert [record.file for record in records if record.flagged] == ["3_0.png"]
    assert set(intact_records(tmp_path, records, hash_all=True)) == {job.file for job in JOBS}
    expected = (pixels(4) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "4_0.png")), expected)


def test_png_carries_its_text_in_any_script(tmp_path: Path) -> None:
    text = {"prompt": "ein Käfer, 甲虫", "seed": "7", "method": "atc"}
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(pixels(0), text))
    with Image.open(path) as image:
        assert image.info == text
    assert path.read_bytes() == encode_png(pixels(0), text)


def submit_all(writer: ImageWriter, submitted: list[ImageJob]) -> None:
    for job in JOBS:
        writer.submit(job, pixels(0), 0.5, False)
        submitted.append(job)
    writer.close()


def test_after_an_error_nothing_is_recorded_that_is_not_stored(tmp_path: Path) -> None:
    writer = ImageWriter(tmp_path, tmp_path / MANIFEST, {})
    (tmp_path / JOBS[5].file).mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=JOBS[5].file):
        submit_all(writer, [])
    writer.close()
    stored = {path.name for path in tmp_path.glob("*.png") if path.is_file()}
    assert {record.file for record in read_manifest(tmp_path)} == stored
    assert {job.file for job in JOBS[:4]} <= stored
    assert not list(tmp_path.glob(".*"))


def test_the_pipeline_waits_when_too_many_images_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def slow(*arguments: Any) -> bytes:
        assert released.wait(30)
        return encode_png(*arguments)

    monkeypatch.setattr(writer_module, "_WAITING_IMAGES", 2)
    monkeypatch.setattr(writer_module, "encode_png", slow)
    submitted: list[ImageJob] = []
    writer = ImageWriter(tmp_path, tmp_path / MANIFEST, {})
    pipeline = threading.Thread(target=submit_all, args=(writer, submitted))
    pipeline.start()
    pipeline.join(0.2)
    assert pipeline.is_alive()
    assert len(submitted) <= 2
    released.set()
    pipeline.join(30)
    assert len(read_manifest(tmp_path)) == len(JOBS)
