import sys

import numpy as np
import pytest
import render_sample_world
from sample_world import CLASSES, render, save

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


def test_a_folder_of_pictures_appears_when_it_is_complete(tmp_path, monkeypatch):
    pictures = [(301, 0, render(301, 1, 32)), (985, 3, render(985, 4, 32))]
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "old.png").touch()  # of an interrupted run
    with pytest.raises(AttributeError):
        save([*pictures, (1, 0, None)], tmp_path / "set")
    assert not (tmp_path / "set").exists()
    save(pictures, tmp_path / "set")
    assert {path.name for path in tmp_path.rglob("*.png")} == {"301_0.png", "985_3.png"}


def test_rendering_never_mixes_sets_of_different_sizes(tmp_path, monkeypatch, capsys):
    command = ["render_sample_world.py", "--out", str(tmp_path / "set"), "--images-per-class"]
    monkeypatch.setattr(sys, "argv", [*command, "1"])
    render_sample_world.main()
    render_sample_world.main()  # complete: left alone
    assert len(list((tmp_path / "set").iterdir())) == len(CLASSES)
    monkeypatch.setattr(sys, "argv", [*command, "2"])
    with pytest.raises(SystemExit):
        render_sample_world.main()
    assert f"must not exist or hold {2 * len(CLASSES)} pictures" in capsys.readouterr().err
