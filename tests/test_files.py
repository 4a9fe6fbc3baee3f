from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sd_tokenmerge.files import (
    file_sha256,
    open_atomically,
    parse_json,
    path_inside,
    read_json,
    temporary_path,
    write_atomically,
)


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_atomic_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert not temporary_path(path).exists()


def test_a_failed_write_names_the_file_and_not_its_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "a"):
        with pytest.raises(OSError, match="directory") as caught:
            write_atomically(path, b"new")
        assert caught.value.filename == str(path)


def test_an_interrupted_block_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write_and_stop() -> None:
        with open_atomically(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open_atomically(path) as first, open_atomically(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # the outer block ends last
    assert os.listdir(tmp_path) == ["a"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(OSError, match="Not a regular file"):
            file_sha256(tmp_path / name)
        with pytest.raises(OSError, match="Not a regular file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 10_000, "digits"),
        (b"1e999", "too large"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b'"\\ud800"', "lone surrogate"),
    ],
)
def test_bad_json_is_one_error_that_names_the_file(
    content: bytes, cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=cause) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))


def test_json_is_limited_in_size(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps("x" * 98))
    assert read_json(path, max_bytes=100) == "x" * 98
    with pytest.raises(ValueError, match="at most 99 bytes"):
        read_json(path, max_bytes=99)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # hypothesis draws no lone surrogates by default
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON_VALUES)
def test_json_round_trips(value: object) -> None:
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "it") == value


@given(st.binary() | st.text(alphabet='{}[]":,\\ud8019eE+-.NaInfty \n').map(str.encode))
@example(b'"\\uD83D\\uDE00"')
def test_any_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = parse_json(data, "it")
    except ValueError:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def test_names_stay_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "sub")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    assert path_inside(folder, "sub/a.png") == folder / "sub" / "a.png"
    assert path_inside(folder, "link/a.png") == folder / "link" / "a.png"
    (tmp_path / "other").symlink_to(folder)
    assert path_inside(tmp_path / "other", "a") == tmp_path / "other" / "a"
    outside = ["/etc/passwd", "..", "a/../../b", "sub/..", "..\\b", "C:\\b", "\\b", "", ".", "a\0b"]
    for name in [*outside, str(tmp_path / "folder" / "a")]:
        with pytest.raises(ValueError, match="must be a relative path inside"):
            path_inside(folder, name)
    for name in ("out/a", "out", "loop"):
        with pytest.raises(ValueError, match="symbolic link"):
            path_inside(folder, name)


@given(st.text() | st.text(alphabet="./\\ab\0:"))
def test_any_name_is_inside_or_refused(name: str) -> None:
    folder = Path(__file__).parent
    try:
        path = path_inside(folder, name)
    except ValueError:
        return
    assert path.resolve().is_relative_to(folder.resolve())
