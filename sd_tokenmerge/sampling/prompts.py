"""Prompt files: one prompt per line, with or without seeds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sd_tokenmerge.files import parse_json, read_regular_file


class Prompt(NamedTuple):
    """One line of a prompt file."""

    text: str
    seed: int | None
    """Seed of its first image; each further image has the next seed. None: the run's scheme."""


def read_prompts(path: str | Path) -> list[Prompt]:
    r"""Read a prompt file: `.txt` with one prompt per line, or `.jsonl` with `prompt` and `seed`.

    The file must be UTF-8, with or without a byte order mark. Lines end with `\n` or `\r\n`. Blank
    lines are refused, because a prompt is numbered by its line.

    Raises:
        ValueError: an unknown suffix, an empty file, or a line that is not a prompt.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"`prompts` must be a .txt or .jsonl file, got {str(path)!r}.")
    try:
        text = read_regular_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` must be UTF-8 text, got {str(path)!r} ({error}).") from None
    if not text:
        raise ValueError(f"`prompts` must hold at least one prompt, got an empty {path.name}.")
    parse = _parse_json if path.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            prompts.append(parse(line.removesuffix("\r")))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    return prompts


def _parse_text(line: str) -> Prompt:
    if not line.strip():
        raise ValueError("a prompt must not be blank.")
    return Prompt(line.strip(), None)


def _parse_json(line: str) -> Prompt:
    entry = parse_json(line, "the line")
    if not isinstance(entry, dict) or not set(entry) <= {"prompt", "seed"}:
        raise ValueError(f'must be {{"prompt": text, "seed": number}}, got {line!r}.')
    seed = entry.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**62):
        raise ValueError(f'"seed" must be an integer in [0, 2^62), got {seed!r}.')
    text = entry.get("prompt")
    if not isinstance(text, str):
        raise ValueError(f'"prompt" must be text, got {text!r}.')
    return Prompt(_parse_text(text).text, seed)
