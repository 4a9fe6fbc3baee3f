from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sd_tokenmerge.files import append_line
from sd_tokenmerge.sampling.manifest import (
    MANIFEST,
    ImageRecord,
    intact_records,
    load_manifest,
    part_files,
    part_name,
    read_manifest,
    unite_manifests,
    write_manifest,
)


def record(class_index: int = 0, image_index: int = 0, content: bytes = b"x") -> ImageRecord:
    return ImageRecord(
        file=f"{class_index}_{image_index}.png",
        class_index=class_index,
        image_index=image_index,
        seed=3,
        prompt="ein Käfer",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        modified_ns=7,
        seconds=0.25,
    )


def test_manifest_round_trips_in_order(tmp_path: Path) -> None:
    records = [record(10), record(2, 1), record(2, 0)]
    write_manifest(tmp_path / MANIFEST, records)
    assert read_manifest(tmp_path) == [records[2], records[1], records[0]]


def test_appended_lines_are_records(tmp_path: Path) -> None:
    for number in range(3):
        append_line(tmp_path / MANIFEST, record(number).to_line())
    assert read_manifest(tmp_path) == [record(number) for number in range(3)]


def test_a_line_cut_off_at_any_byte_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    write_manifest(path, [record(0), record(1)])
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        content = load_manifest([path])
        assert content.records == [record(0)]
        assert content.damaged_lines == []
        assert content.unfinished_lines == ([f"{MANIFEST}, line 2"] if length > start else [])
        assert read_manifest(tmp_path) == [record(0)]


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "",
        "{}",
        "[]",
        record().to_line().replace('"seed": 3', '"seed": "3"'),
        record().to_line().replace('"seed": 3', '"sede": 3'),
        record().to_line() + "x",
        record().to_line().replace("0_0.png", "../0_0.png"),
        record().to_line().replace("0.25", "NaN"),
        record().to_line().replace('"class_index": 0', '"class_index": false'),
        "[" * 100_000,
        "\x00\x00",
    ],
)
def test_damaged_lines_are_found_and_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / MANIFEST
    path.write_text(f"{record(5).to_line()}\n{line}\n{record(6).to_line()}\n")
    content = load_manifest([path])
    assert content.records == [record(5), record(6)]
    assert content.damaged_lines == [f"{MANIFEST}, line 2"]
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_manifest(tmp_path)


def test_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a manifest\.jsonl"):
        read_manifest(tmp_path)


def intact(folder: Path, *records: ImageRecord, hash_all: bool = False) -> dict[str, ImageRecord]:
    """`intact_records` without the modification times."""
    found = intact_records(folder, records, hash_all=hash_all)
    return {name: replace(entry, modified_ns=7) for name, entry in found.items()}


def test_intact_records_are_those_with_the_recorded_content(tmp_path: Path) -> None:
    (tmp_path / "0_0.png").write_bytes(b"x")
    (tmp_path / "1_0.png").write_bytes(b"changed")
    (tmp_path / "3_0.png").write_bytes(b"y")
    (tmp_path / "4_0.png").mkdir()
    records = [record(number) for number in range(5)]
    assert intact(tmp_path, *records) == {"0_0.png": record(0)}
    assert intact(tmp_path, *records, hash_all=True) == {"0_0.png": record(0)}


def test_a_file_of_the_recorded_size_and_time_is_read_only_to_hash_all(tmp_path: Path) -> None:
    path = tmp_path / "0_0.png"
    path.write_bytes(b"x")
    known = intact_records(tmp_path, [record()], hash_all=True)
    assert known["0_0.png"].modified_ns == path.stat().st_mtime_ns
    path.write_bytes(b"y")
    os.utime(path, ns=(0, known["0_0.png"].modified_ns))  # as damage of the disk leaves it
    assert intact_records(tmp_path, known.values(), hash_all=False) == known
    assert intact_records(tmp_path, known.values(), hash_all=True) == {}
    os.utime(path)
    assert intact_records(tmp_path, known.values(), hash_all=False) == {}


def test_of_two_records_of_a_file_the_true_one_counts(tmp_path: Path) -> None:
    (tmp_path / "0_0.png").write_bytes(b"new")
    old, new = record(content=b"old"), record(content=b"new")
    assert intact(tmp_path, old, new) == {"0_0.png": new}
    assert intact(tmp_path, new, old) == {"0_0.png": new}


def test_processes_and_shards_write_apart_and_are_united(tmp_path: Path) -> None:
    names = [part_name(*who) for who in [(0, 1, 0), (0, 1, 1), (1, 12, 0), (1, 12, 3), (0, 2, 0)]]
    assert names == [
        "manifest.jsonl",
        "manifest.process-1.jsonl",
        "manifest.shard-2-of-12.jsonl",
        "manifest.shard-2-of-12.process-3.jsonl",
        "manifest.shard-1-of-2.jsonl",
    ]
    for number, name in enumerate(names):
        write_manifest(tmp_path / name, [record(number)])
    everything = [record(number) for number in range(5)]
    assert read_manifest(tmp_path) == everything
    assert [path.name for path in part_files(tmp_path, 1, 12)] == names[2:4]

    unite_manifests(tmp_path, 1, 12)
    assert not (tmp_path / names[3]).exists()
    assert read_manifest(tmp_path) == everything

    unite_manifests(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    assert read_manifest(tmp_path) == everything


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(OSError, match="Not a regular file"):
        read_manifest(tmp_path)
