from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sd_tokenmerge.fid import extraction, storage
from sd_tokenmerge.fid.features import FeatureSpace, extract_features
from sd_tokenmerge.fid.images import ImageError, read_image
from sd_tokenmerge.fid.preprocess import PROTOCOLS
from tests.fid.pictures import draw
from tests.fid.toy import ToyNetwork, toy_extractor
from tests.stored_json import MANY

REPOSITORY = Path(__file__).resolve().parents[2]


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "features").iterdir()) if (cache / "features").exists() else []


def test_features_follow_the_sorted_paths(picture_set: Path) -> None:
    result = extract_features(picture_set, extractor=toy_extractor(), cache=False, batch_size=7)
    assert list(result.files) == sorted(path.name for path in picture_set.iterdir())
    network, protocol = ToyNetwork(), PROTOCOLS["atc"]
    for row, name in zip(result.features, result.files, strict=True):
        pixels = protocol.resize(read_image(picture_set / name), 32)
        assert torch.allclose(row, network(pixels[None] / 128 - 1)[0], atol=1e-6)
    assert result.features.dtype == torch.float32
    assert result.space == FeatureSpace("toy", "atc", "float32", "0" * 64)


def test_every_forward_pass_has_the_same_batch_size(picture_set: Path) -> None:
    network = ToyNetwork()
    extractor = toy_extractor(network)
    whole = extract_features(picture_set, extractor=extractor, cache=False, batch_size=48)
    assert network.calls == [48]
    parts = extract_features(picture_set, extractor=extractor, cache=False, batch_size=20)
    assert network.calls[1:] == [20, 20, 20]
    assert torch.allclose(whole.features, parts.features, atol=1e-6)
    extract_features(picture_set, extractor=extractor, cache=False, batch_size=1000)
    assert network.calls[-1] == 48


def test_the_next_images_are_read_while_the_network_computes(
    picture_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0
    has_read = threading.Condition()

    def count(path: Path) -> Image.Image:
        nonlocal num_read
        image = read_image(path)
        with has_read:
            num_read += 1
            has_read.notify_all()
        return image

    class Waiting(ToyNetwork):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = super().forward(x)
            wanted = min(48, 8 * (len(self.calls) + 1))
            with has_read:
                assert has_read.wait_for(lambda: num_read >= wanted, timeout=60)
            return features

    monkeypatch.setattr(extraction, "read_image", count)
    network = Waiting()
    extract_features(picture_set, extractor=toy_extractor(network), cache=False, batch_size=8)
    assert network.calls == [8] * 6


def test_a_cache_hit_decodes_no_image_and_loads_no_network(
    picture_set: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("the cache has it already")

    first = extract_features(picture_set, extractor=toy_extractor())
    monkeypatch.setattr(Image, "open", refuse)
    second = extract_features(picture_set, extractor=replace(toy_extractor(), load=refuse))
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(first.features, second.features)
    assert first.files == second.files
    assert first.hashes == second.hashes
    assert len(entries(private_cache)) == 1


def test_the_cache_is_keyed_by_content(picture_set: Path, tmp_path: Path) -> None:
    cache = tmp_path / "other cache"
    extract_features(picture_set, extractor=toy_extractor(), cache=cache)
    copy = tmp_path / "copy"
    shutil.copytree(picture_set, copy)
    assert extract_features(copy, extractor=toy_extractor(), cache=cache).from_cache
    changes = [
        {"protocol": "pytorch-fid"},
        {"precision": "bfloat16"},
    ]
    for change in changes:
        result = extract_features(copy, extractor=toy_extractor(), cache=cache, **change)
        assert not result.from_cache
    draw(99, 0).save(copy / "0_0.png")
    assert not extract_features(copy, extractor=toy_extractor(), cache=cache).from_cache
    assert len(entries(cache)) == 4


def test_renamed_files_keep_the_entry_and_get_their_new_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(3):
        draw(index, 0).save(folder / f"a{index}.png")
    extract_features(folder, extractor=toy_extractor())
    for index in range(3):
        (folder / f"a{index}.png").rename(folder / f"b{index}.png")
    again = extract_features(folder, extractor=toy_extractor())
    assert again.from_cache
    assert again.files == ("b0.png", "b1.png", "b2.png")


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "pickle", "empty"])
def test_a_damaged_entry_is_computed_again(
    damage: str, picture_set: Path, private_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = extract_features(picture_set, extractor=toy_extractor())
    (entry,) = entries(private_cache)
    content = bytearray(entry.read_bytes())
    if damage == "cut":
        entry.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[200] ^= 1
        entry.write_bytes(content)
    elif damage == "foreign":
        np.savez(entry, other=np.zeros(3))
    elif damage == "pickle":
        np.savez(entry, features=np.array([object()], dtype=object), allow_pickle=True)
    else:
        entry.write_bytes(b"")
    second = extract_features(picture_set, extractor=toy_extractor())
    assert not second.from_cache
    assert "A damaged cache entry is computed again" in caplog.text
    assert torch.equal(first.features, second.features)
    assert extract_features(picture_set, extractor=toy_extractor()).from_cache


@MANY
@given(data=st.data())
def test_any_bytes_in_the_cache(picture_set: Path, tmp_path: Path, data: st.DataObject) -> None:
    cache = tmp_path / "fuzzed"
    options = {"extractor": toy_extractor(), "cache": cache}
    first = extract_features(picture_set, **options)
    (entry,) = entries(cache)
    content = bytearray(entry.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    entry.write_bytes(data.draw(st.sampled_from([bytes(content)]) | st.binary(max_size=200)))
    assert torch.equal(extract_features(picture_set, **options).features, first.features)


def test_a_failed_write_leaves_nothing(
    picture_set: Path,
    private_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    result = extract_features(picture_set, extractor=toy_extractor())
    assert result.num_images == 48
    assert "No space left on device" in caplog.text
    assert entries(private_cache) == []


def test_the_next_writer_removes_what_a_killed_one_left(
    picture_set: Path, private_cache: Path
) -> None:
    program = f"""
        import os, signal
        from sd_tokenmerge.fid import extraction, storage
        from sd_tokenmerge.fid.features import extract_features
        from tests.fid.toy import toy_extractor
        storage.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        extract_features({str(picture_set)!r}, extractor=toy_extractor())
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = entries(private_cache)
    assert leftover.name.startswith(".")
    os.utime(leftover, (0, 0))
    written = leftover.with_name(".of-a-running-process.npz.tmp")
    written.touch()
    assert not extract_features(picture_set, extractor=toy_extractor()).from_cache
    assert extract_features(picture_set, extractor=toy_extractor()).from_cache
    assert [path for path in entries(private_cache) if path.suffix == ".tmp"] == [written]


def test_a_corrupt_image_is_named_and_nothing_is_cached(
    tmp_path: Path, private_cache: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(5):
        draw(index, 0).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:500])
    with pytest.raises(ImageError, match=r"3\.png' cannot be read"):
        extract_features(folder, extractor=toy_extractor(), batch_size=2)
    assert entries(private_cache) == []


class _Broken(ToyNetwork):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = super().forward(x)
        features[x.mean((1, 2, 3)) > 0.9] = torch.nan
        return features


def test_nan_features_name_the_image_and_are_not_cached(
    tmp_path: Path, private_cache: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(4):
        draw(index, 0).save(folder / f"{index}.png")
    Image.new("RGB", (64, 64), "white").save(folder / "2.png")
    with pytest.raises(ImageError, match=r"NaN or infinity for 1 of 4 images.*2\.png"):
        extract_features(folder, extractor=toy_extractor(_Broken()))
    assert entries(private_cache) == []


def test_duplicates_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, index in (("a", 0), ("b", 1), ("c", 0), ("d", 0)):
        draw(index, 0).save(folder / f"{name}.png")
    result = extract_features(folder, extractor=toy_extractor())
    assert result.num_images == 4
    assert result.duplicates == [("a.png", "c.png"), ("a.png", "d.png")]


def test_progress_reaches_the_end(picture_set: Path) -> None:
    seen: list[tuple[int, int]] = []
    extract_features(
        picture_set,
        extractor=toy_extractor(),
        batch_size=20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(0, 48), (20, 48), (40, 48), (48, 48)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8"},
            "`precision` must be one of float32, bfloat16, float16, got 'int8'",
        ),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
        ({"protocol": "lanczos"}, "`protocol` must be one of"),
        ({"extractor": "vgg"}, "`extractor` must be one of inception"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, picture_set: Path) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(picture_set, **{"extractor": toy_extractor(), **options})


def test_mixed_precision_is_a_space_of_its_own(picture_set: Path) -> None:
    full = extract_features(picture_set, extractor=toy_extractor())
    mixed = extract_features(picture_set, extractor=toy_extractor(), precision="bfloat16")
    assert not torch.equal(full.features, mixed.features)
    assert torch.allclose(full.features, mixed.features, rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match=r"different features: toy .*float32 and toy .*bfloat16"):
        full.space.require_same(mixed.space)


def test_spaces_compare_weights_where_both_are_known() -> None:
    known, other = (FeatureSpace("toy", "atc", weights_sha256=digit * 64) for digit in "12")
    unknown = FeatureSpace("toy", "atc", assumed=True)
    known.require_same(unknown)
    unknown.require_same(known)
    with pytest.raises(ValueError, match=r"weights 11111111.*weights 22222222"):
        known.require_same(other)
    with pytest.raises(ValueError, match=r"protocol atc.*protocol pytorch-fid"):
        known.require_same(FeatureSpace("toy", "pytorch-fid"))
