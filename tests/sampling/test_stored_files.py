"""Files that people edit and disks damage: read correctly, or refused with one kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_tokenmerge.sampling.description import (
    RUN_FILE,
    Description,
    DescriptionError,
    content_differences,
    option_differences,
    read_description,
    surroundings,
)
from sd_tokenmerge.sampling.locate import files_identity
from sd_tokenmerge.sampling.manifest import MANIFEST, ImageRecord, load_manifest
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import planned_files
from sd_tokenmerge.sampling.prompts import read_prompts
from sd_tokenmerge.sampling.resolve import read_sample_settings, resolve_options
from tests.stored_json import JSON, MANY, places, replaced


def description(model: str) -> dict[str, Any]:
    options = GenerateOptions(out="o", model=model, device="cpu", classes=(3, 4), lora=("a@0.5",))
    files = {"sha256": "0" * 64, "files": {}}
    return Description(
        options=resolve_options(options),
        num_images=4,
        plan_sha256="0" * 64,
        model={"pipeline": files, "vae": None, "lora": [files], "lora_scales": [0.5]},
        created="2026-01-01T00:00:00+00:00",
        device={"type": "cpu", "name": "a CPU"},
        versions=surroundings("cpu")["versions"],
        commit=None,
    ).to_json()


def test_a_description_survives_its_file(tmp_path: Path) -> None:
    values = description(str(tmp_path))
    (tmp_path / RUN_FILE).write_text(json.dumps(values))
    read = read_description(tmp_path)
    assert read is not None
    assert read.to_json() == values


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_description(tmp_path: Path, data: st.DataObject) -> None:
    values = description(str(tmp_path))
    path = data.draw(st.sampled_from(places(values)))
    (tmp_path / RUN_FILE).write_text(json.dumps(replaced(values, path, data.draw(JSON))))
    try:
        read = read_description(tmp_path)
    except DescriptionError:
        return
    assert read is not None
    good = Description.from_json(values)
    option_differences(read, good.options)
    content_differences(read, good)
    assert len(planned_files(read.options, read.num_images)) == read.num_images
    texts = [read.created, read.commit or "", *read.device.values()]
    texts += [read.versions[name] for name in good.versions if name != "python"]
    "".join([*texts, read.model["pipeline"]["sha256"]])


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_sample(tmp_path: Path, data: st.DataObject) -> None:
    values = {"classes": [3, 4], "size": 64, "steps": 5, "guidance_scale": 3.0}
    path = data.draw(st.sampled_from(places(values)))
    (tmp_path / "sample.json").write_text(json.dumps(replaced(values, path, data.draw(JSON))))
    try:
        found = read_sample_settings(str(tmp_path))
    except ValueError:
        return
    assert set(found) <= {"classes", "height", "width", "steps", "guidance_scale"}


RECORD = ImageRecord("3_0.png", 3, 0, 30, "a shark", "0" * 64, 9, 1, 0.5)


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_record(tmp_path: Path, data: st.DataObject) -> None:
    values = asdict(RECORD)
    path = data.draw(st.sampled_from(places(values)))
    line = json.dumps(replaced(values, path, data.draw(JSON)))
    (tmp_path / MANIFEST).write_text(line + "\n")
    content = load_manifest([tmp_path / MANIFEST])
    assert len(content.records) + len(content.damaged_lines) == 1
    for record in content.records:
        assert record.file == record.job.file
        assert ImageRecord(**json.loads(record.to_line())) == record


@MANY
@given(data=st.data())
def test_any_value_at_any_place_of_a_model_index(tmp_path: Path, data: st.DataObject) -> None:
    values = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}
    path = data.draw(st.sampled_from(places(values)))
    index = replaced(values, path, data.draw(JSON))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with suppress(ValueError):
        assert all(".." not in name for name in files_identity(tmp_path)["files"])


LINES: dict[str, Callable[[Path], Any]] = {
    MANIFEST: lambda path: load_manifest([path]),
    "p.jsonl": read_prompts,
    "p.txt": read_prompts,
}


@pytest.mark.parametrize("name", LINES)
@MANY
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_lines(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with nullcontext() if name == MANIFEST else suppress(ValueError):
        LINES[name](path)
