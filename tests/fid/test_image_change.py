from __future__ import annotations

from dataclasses import replace
from math import inf, log10
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.fid.images import read_image
from tests.fid.pictures import blur, draw
from tests.fid.toy import toy_extractor


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    baseline, changed = tmp_path / "baseline", tmp_path / "changed"
    for folder in (baseline, changed):
        (folder / "sub").mkdir(parents=True)
    for index, strength in enumerate((0, 1, 3)):
        picture = draw(index, 0)
        picture.save(baseline / "sub" / f"{index}.png")
        (blur(picture, strength) if strength else picture).save(changed / "sub" / f"{index}.png")
    draw(9, 0).save(baseline / "more.png")
    return baseline, changed


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004: an 11x11 Gaussian window of sigma 1.5 at every pixel, edges mirrored."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    a, b = (np.pad(z, ((5, 5), (5, 5), (0, 0)), mode="reflect").astype(float) for z in (a, b))
    for channel in range(3):
        x = np.lib.stride_tricks.sliding_window_view(a[..., channel], (11, 11))
        y = np.lib.stride_tricks.sliding_window_view(b[..., channel], (11, 11))
        mean_x, mean_y = ((z * window).sum((-1, -2)) for z in (x, y))
        var_x, var_y = (
            (z * z * window).sum((-1, -2)) - z_mean**2 for z, z_mean in ((x, mean_x), (y, mean_y))
        )
        covariance = (x * y * window).sum((-1, -2)) - mean_x * mean_y
        values.append(
            (2 * mean_x * mean_y + c1)
            * (2 * covariance + c2)
            / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        )
    return float(np.mean(values))


def test_psnr_and_ssim_are_their_definitions(folders: tuple[Path, Path]) -> None:
    result = paired_change(*folders)
    assert [image.file for image in result.images] == ["sub/0.png", "sub/1.png", "sub/2.png"]
    for image in result.images:
        a, b = (np.asarray(read_image(folder / image.file)).astype(float) for folder in folders)
        error = ((a - b) ** 2).mean()
        expected = inf if error == 0 else 10 * log10(255**2 / error)
        assert image.psnr == pytest.approx(expected, rel=1e-5)
        assert image.ssim == pytest.approx(slow_ssim(a, b), abs=1e-4)
        assert image.feature_distance is None
    first, second, third = result.images
    assert (first.psnr, first.ssim) == (inf, pytest.approx(1))
    assert second.psnr > third.psnr
    assert second.ssim > third.ssim


def test_the_mean_is_over_the_images_that_differ(folders: tuple[Path, Path]) -> None:
    result = paired_change(*folders)
    assert result.num_images == 3
    assert result.num_identical == 1
    assert result.psnr == pytest.approx((result.images[1].psnr + result.images[2].psnr) / 2)
    assert result.ssim == pytest.approx(sum(image.ssim for image in result.images) / 3)
    same = paired_change(folders[0], folders[0])
    assert same.psnr == inf
    assert same.num_identical == same.num_images == 4


def test_feature_distances_are_between_twins(folders: tuple[Path, Path]) -> None:
    baseline, changed = (
        extract_features(folder, extractor=toy_extractor(), cache=False) for folder in folders
    )
    result = paired_change(*folders, features=(baseline, changed))
    distances = [image.feature_distance for image in result.images]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    for row, name in enumerate(changed.files):
        twin = baseline.features[baseline.files.index(name)]
        expected = float((changed.features[row] - twin).norm())
        assert distances[row] == pytest.approx(expected, abs=1e-6)
    assert result.feature_distance == pytest.approx(sum(distances) / 3)
    with pytest.raises(ValueError, match="`features` must be of the images"):
        paired_change(*folders, features=(changed, baseline))
    other = replace(changed, space=replace(changed.space, protocol="pytorch-fid"))
    with pytest.raises(ValueError, match="different features"):
        paired_change(*folders, features=(baseline, other))


def test_an_image_without_a_twin_is_named(folders: tuple[Path, Path]) -> None:
    draw(5, 0).save(folders[1] / "sub" / "5.png")
    with pytest.raises(ValueError, match=r"1 of 4 have none, the first being 'sub/5\.png'"):
        paired_change(*folders)


def test_sizes_must_match(folders: tuple[Path, Path]) -> None:
    draw(0, 0).resize((80, 60)).save(folders[1] / "sub" / "0.png")
    with pytest.raises(ValueError, match="must have the same size, got 80x60 and 160x160"):
        paired_change(*folders)


def test_tiny_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (10, 40)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least 11 pixels wide and high for SSIM, got 10x40"):
        paired_change(tmp_path, tmp_path)
