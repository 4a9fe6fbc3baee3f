import numpy as np
import pytest
from sample_world import CLASSES, render

from sd_tokenmerge.sampling.imagenet import CLASSES as IMAGENET


def test_the_world_has_at_least_twelve_imagenet_classes_under_their_own_numbers():
    names = {index: IMAGENET[index].short_name for index in CLASSES}
    assert len(names) >= 12
    assert names[301] == "ladybug"
    assert names[954] == "banana"
    assert names[985] == "daisy"


@pytest.mark.parametrize("class_index", CLASSES)
def test_a_picture_depends_on_class_and_seed_alone(class_index):
    first, again, other = (np.asarray(render(class_index, seed, 64)) for seed in (5, 5, 6))
    assert first.shape == (64, 64, 3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 5


def test_a_larger_picture_shows_the_same_scene():
    small = np.asarray(render(301, 3, 128), np.float64)
    large = np.asarray(render(301, 3, 256).reduce(2), np.float64)
    assert np.abs(small - large).mean() < 6


def test_a_class_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"`class_index` must be one of \[301, .*\], got 0"):
        render(0, 1)
