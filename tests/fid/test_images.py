from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.fid.images import ImageError, find_images, read_image
from tests.fid.pictures import draw

PICTURE = draw(0, 0)


def test_images_are_found_recursively_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.PNG", "a.jpg", "c.webp", "b/.hidden.png", ".git/x.png", "run.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.jpg", "b/10.PNG", "b/2.png", "c.webp"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "set" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.png").write_bytes(b"")
    (tmp_path / "set" / "real" / "x.png").write_bytes(b"")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "real" / "loop").symlink_to(tmp_path / "set")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path / "set")]
    assert found == ["set/link/y.png", "set/real/x.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_part_of_the_set(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert find_images(tmp_path) == [tmp_path / "x.png"]


def test_a_dangling_link_is_not_skipped_silently(tmp_path: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "gone")
    assert find_images(tmp_path) == [tmp_path / "x.png"]
    with pytest.raises(ImageError, match=r"x\.png' cannot be read"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("other", ["EPS", "ICO", "PCX", "TGA"])
def test_other_formats_are_not_opened_whatever_their_suffix(other: str, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "x.png", format=other)
    with pytest.raises(ImageError, match=r"x\.png' cannot be read: it is not an image"):
        read_image(tmp_path / "x.png")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an existing folder"):
        find_images(tmp_path / "missing")
    with pytest.raises(ValueError, match="found none in"):
        find_images(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ValueError, match="got the file"):
        find_images(tmp_path / "file.png")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()

    def refuse(self: Path) -> list[Path]:  # root reads anything, so the permission is simulated
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=r"locked' cannot be read: Permission denied\."):
        find_images(locked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads anything")
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    PICTURE.save(path)
    path.chmod(0)
    with pytest.raises(ImageError, match=r"x\.png"):
        read_image(path)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png' cannot be read"):
        read_image(tmp_path / "gone.png")


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"x\.png' cannot be read: it is empty"):
        read_image(path)
    path.write_text("<html>")
    with pytest.raises(ImageError, match=r"x\.png' cannot be read: it is not an image"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    PICTURE.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=rf"x\.{suffix}' cannot be read"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow comments on what it finds
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif", "ppm"])
def test_damaged_files_give_an_image_or_an_image_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    PICTURE.resize((24, 20)).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            mode = read_image(path).mode
        except ImageError:
            refused += 1
        else:
            assert mode == "RGB"
    assert refused > 0


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA"])
def test_other_modes_are_converted_as_pillow_does(mode: str, tmp_path: Path) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    path = tmp_path / f"x.{suffix}"
    PICTURE.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    with Image.open(path) as stored:
        assert stored.mode == mode
        assert np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    PICTURE.convert("CMYK").save(path, quality=95)
    difference = np.asarray(read_image(path)).astype(int) - np.asarray(PICTURE)
    assert np.abs(difference).mean() < 6


def test_the_alpha_channel_is_dropped(tmp_path: Path) -> None:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), np.asarray(PICTURE))


def test_transparent_palettes_are_silent(tmp_path: Path) -> None:
    palette = PICTURE.quantize(32)
    palette.save(tmp_path / "x.png", transparency=bytes(range(32)))
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), expected)


def test_16_bit_images_lose_their_low_byte(tmp_path: Path) -> None:
    grey = np.asarray(PICTURE.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 256 + 77).save(tmp_path / "grey.png")
    Image.fromarray(grey * 256 + 77).save(tmp_path / "grey.tiff")
    for name in ("grey.png", "grey.tiff"):
        pixels = np.asarray(read_image(tmp_path / name))
        assert np.array_equal(pixels, np.repeat(grey[..., None].astype(np.uint8), 3, axis=2))
    (tmp_path / "grey.pgm").write_bytes(
        b"P5 160 160 65535\n" + (grey * 256 + 77).astype(">u2").tobytes()
    )
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.pgm")), pixels)
    (tmp_path / "colour.png").write_bytes(png_16_bit_rgb(np.asarray(PICTURE)))
    assert np.array_equal(np.asarray(read_image(tmp_path / "colour.png")), np.asarray(PICTURE))


def png_16_bit_rgb(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG (Pillow does not write one) whose high bytes are `pixels`."""
    import struct
    import zlib

    height, width, _ = pixels.shape
    values = (pixels.astype(np.uint16) * 256 + 200).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode: str, tmp_path: Path) -> None:
    PICTURE.convert("L").convert(mode).save(tmp_path / "x.tiff")
    with pytest.raises(ImageError, match=rf"x\.tiff' has pixels of mode '{mode}'"):
        read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    frames = [PICTURE, draw(1, 0), draw(2, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=rf"x\.{suffix}' holds 3 frames"):
        read_image(path)


def test_multi_picture_jpegs_count_as_their_first(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    PICTURE.save(path, format="MPO", save_all=True, append_images=[draw(1, 0)], quality=95)
    difference = np.asarray(read_image(path)).astype(int) - np.asarray(PICTURE)
    assert np.abs(difference).mean() < 6


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    wide = PICTURE.resize((60, 30))
    buffer = io.BytesIO()
    wide.save(buffer, "JPEG", quality=95, exif=exif)
    path = tmp_path / "x.jpg"
    path.write_bytes(buffer.getvalue())
    assert read_image(path).size == (60, 30)


def test_pixels_beyond_reason_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PICTURE.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"x\.png' cannot be read: Image size"):
        read_image(tmp_path / "x.png")
