from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd_tokenmerge.sampling.prompts import Prompt, read_prompts


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(" a red cube \nein Käfer, 100 %\n", encoding="utf-8")
    assert read_prompts(path) == [Prompt("a red cube", None), Prompt("ein Käfer, 100 %", None)]


def test_json_lines_may_give_seeds(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 7}\n{"prompt": "b"}\n')
    assert read_prompts(path) == [Prompt("a", 7), Prompt("b", None)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a", "must be a .txt or .jsonl file"),
        ("p.txt", "", "at least one prompt"),
        ("p.txt", "a\n\nb", "p.txt, line 2: a prompt must not be blank"),
        ("p.jsonl", "{", "p.jsonl, line 1: "),
        ("p.jsonl", "[1]", "line 1: must be"),
        ("p.jsonl", '{"prompt": "a", "sede": 1}', "line 1: must be"),
        ("p.jsonl", '{"prompt": 1}', '"prompt" must be text, got 1'),
        ("p.jsonl", '{"seed": 1}', '"prompt" must be text, got None'),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', '"seed" must be an integer'),
        ("p.jsonl", '{"prompt": "a", "seed": true}', '"seed" must be an integer'),
        ("p.jsonl", '{"prompt": " "}', "must not be blank"),
        ("p.jsonl", "[" * 100_000, "p.jsonl, line 1: "),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_only_newlines_separate_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa\u2028b\x0bc\x0cd\r\ne\r\n".encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u2028b\x0bc\x0cd", "e"]
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\n'.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u2028b"]


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`prompts` must be UTF-8 text, got .*p\.txt"):
        read_prompts(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.jsonl"):
        with pytest.raises(OSError, match="Not a regular file"):
            read_prompts(tmp_path / name)
