"""The drawing of clusters, compared with a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge import draw_clusters
from tests.reference.clusters import drawn_clusters


def random_picture(height, width, *, brightest=255):
    pixels = np.random.default_rng(0).integers(0, brightest, (height, width, 3), endpoint=True)
    return pixels.astype(np.uint8)


def scattered(grid, size):
    """Clusters of `size` tokens anywhere on the grid."""
    count = grid[0] * grid[1]
    return (np.random.default_rng(1).permutation(count) // size).reshape(grid).astype(np.int32)


@pytest.mark.parametrize("brightest", [255, 50], ids=["bright", "dark"])
@pytest.mark.parametrize(
    ("size", "grid", "cluster"), [((128, 128), (16, 16), 3), ((75, 130), (9, 15), 2)]
)
def test_pixels_equal_the_slow_twin(size, grid, cluster, brightest):
    pixels, labels = random_picture(*size, brightest=brightest), scattered(grid, cluster)
    drawn = np.asarray(draw_clusters(Image.fromarray(pixels), labels))
    # halves may be rounded either way
    difference = drawn.astype(int) - drawn_clusters(pixels, labels).astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference == 0).mean() > 0.99


def test_a_small_picture_is_enlarged_to_8_pixels_per_token():
    picture, labels = Image.fromarray(random_picture(20, 40)), scattered((10, 20), 3)
    drawn = draw_clusters(picture, labels)
    assert drawn.size == (160, 80)
    enlarged = picture.resize((160, 80), Image.Resampling.BICUBIC)
    assert drawn.tobytes() == draw_clusters(enlarged, labels).tobytes()


def test_the_three_largest_clusters_are_numbered_on_their_own_tokens():
    labels = np.repeat(np.arange(5), [10, 2, 6, 8, 6]).reshape(1, 32)
    pixels = np.full((32, 32 * 32, 3), 100, np.uint8)
    drawn = np.asarray(draw_clusters(Image.fromarray(pixels), labels))
    written = (drawn == 255).all(-1).any(0).reshape(32, 32).any(1)
    assert set(labels[0, written]) == {0, 2, 3}
    few = np.arange(128).reshape(2, 64)
    pixels = np.full((32, 64 * 16, 3), 100, np.uint8)
    assert not (np.asarray(draw_clusters(Image.fromarray(pixels), few)) == 255).any()


def test_numbers_do_not_overlap():
    labels = np.zeros((9, 9), int)
    labels[4, 3:6] = 1  # both clusters have the same centre
    pixels = np.full((72, 72, 3), 100, np.uint8)
    drawn = np.asarray(draw_clusters(Image.fromarray(pixels), labels))
    white = (drawn == 255).all(-1).any(1)
    assert np.diff(white.astype(int)).tolist().count(1) == 2, "two lines of digits"


def test_unused_labels_are_allowed():
    labels = np.array([[0, 7]])
    picture = Image.fromarray(random_picture(8, 16))
    assert draw_clusters(picture, labels).tobytes() == draw_clusters(picture, labels // 7).tobytes()


@pytest.mark.parametrize(
    "labels", [np.zeros(4, int), np.zeros((0, 4), int), np.zeros((2, 2)), np.array([[0, -1]])]
)
def test_other_labels_are_refused(labels):
    with pytest.raises(ValueError, match="`labels` must be a grid of integers from 0"):
        draw_clusters(Image.new("RGB", (8, 8)), labels)
