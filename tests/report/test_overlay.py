"""Recordings drawn by step and block, and as an animation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageSequence

from sd_tokenmerge import draw_cluster_frames, draw_cluster_grid, draw_clusters, save_animation
from sd_tokenmerge.patching.recording import RecordedPartition, RecordedStep, Recording

BLOCKS = tuple(
    f"{place}.attentions.0.transformer_blocks.0" for place in ("down_blocks.0", "up_blocks.3")
)
EMPTY = (236, 234, 228)


def partition(seed):
    labels = np.random.default_rng(seed).permuted(np.arange(2 * 64).reshape(2, 64) % 32, axis=1)
    return RecordedPartition(labels.reshape(2, 1, 8, 8).astype(np.int32), 32)


@pytest.fixture
def recording():
    """Seven steps of two blocks; the second block merges from the third step on."""
    made = Recording(BLOCKS)
    for step in range(7):
        merging = BLOCKS[: 1 if step < 2 else 2]
        partitions = {block: partition(10 * step + i) for i, block in enumerate(merging)}
        made.steps.append(RecordedStep(900.0 - 100 * step, partitions))
    return made


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def places(sheet, drawing):
    """The upper left corners at which a drawing is found on a sheet."""
    pixels, wanted = np.asarray(sheet).astype(int), np.asarray(drawing).astype(int)
    height, width, _ = wanted.shape
    first_line = np.lib.stride_tricks.sliding_window_view(pixels, (1, width, 3))[:, :, 0, 0]
    candidates = np.argwhere((np.abs(first_line - wanted[0]) <= 2).all((-1, -2)))
    return [
        (int(y), int(x))
        for y, x in candidates
        if y + height <= len(pixels)
        and (np.abs(pixels[y : y + height, x : x + width] - wanted) <= 2).all()
    ]


def test_steps_are_rows_and_blocks_are_columns(recording, picture):
    sheet = draw_cluster_grid(picture, recording, steps=[2, 6])
    found = []
    for step in (2, 6):
        for block in BLOCKS:
            labels = recording.steps[step].partitions[block].labels[-1, 0]
            (place,) = places(sheet, draw_clusters(picture, labels))
            found.append(place)
    assert found == sorted(found)
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[2][1]


def test_a_row_of_the_batch_can_be_chosen(recording, picture):
    sheet = draw_cluster_grid(picture, recording, steps=[2], blocks=BLOCKS[:1], row=0)
    labels = recording.steps[2].partitions[BLOCKS[0]].labels[:, 0]
    assert len(places(sheet, draw_clusters(picture, labels[0]))) == 1
    assert not places(sheet, draw_clusters(picture, labels[1]))


def test_by_default_five_steps_with_the_first_and_the_last(recording, picture):
    chosen = draw_cluster_grid(picture, recording, steps=[0, 2, 3, 4, 6])
    assert draw_cluster_grid(picture, recording).tobytes() == chosen.tobytes()
    del recording.steps[2:]
    assert (np.asarray(draw_cluster_grid(picture, recording)) == EMPTY).all(-1).any()


def test_a_frame_for_each_step_that_merged(recording, picture, tmp_path):
    frames = draw_cluster_frames(picture, recording, BLOCKS[1])
    assert len(frames) == 5
    labels = recording.steps[4].partitions[BLOCKS[1]].labels[-1, 0]
    assert len(places(frames[2], draw_clusters(picture, labels))) == 1
    assert len(draw_cluster_frames(picture, recording)) == 7

    save_animation(frames, tmp_path / "clusters.gif")
    with Image.open(tmp_path / "clusters.gif") as animation:
        shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
        assert animation.info["loop"] == 0
    assert len(shown) == 5
    for ours, theirs in zip(shown, frames, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 8  # 256 colours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [7]}, r"`steps` must be in \[0, 7\), got 7"),
        ({"blocks": ["mid_block"]}, "`block` must be a merged block"),
        ({"row": 2}, r"`row` must be in \[-2, 2\), got 2"),
        ({"frame": 1}, r"`frame` must be in \[0, 1\), got 1"),
    ],
)
def test_refusals(recording, picture, options, message):
    with pytest.raises(ValueError, match=message):
        draw_cluster_grid(picture, recording, **options)


def test_a_frame_of_a_video(picture):
    labels = partition(0).labels.reshape(2, 2, 4, 8)
    video = Recording(BLOCKS)
    video.steps.append(RecordedStep(1.0, {BLOCKS[0]: RecordedPartition(labels, 32)}))
    frame = picture.crop((0, 0, 64, 32))
    (drawn,) = draw_cluster_frames(frame, video, frame=1)
    assert len(places(drawn, draw_clusters(frame, labels[-1, 1]))) == 1
    with pytest.raises(ValueError, match="the shape of the 4x8 tokens, got 64x64 pixels"):
        draw_cluster_frames(picture, video)


def test_by_default_five_blocks(picture):
    blocks = tuple(f"transformer_blocks.{i}" for i in range(9))
    made = Recording(blocks)
    made.steps.append(RecordedStep(1.0, {block: partition(0) for block in blocks}))
    chosen = draw_cluster_grid(picture, made, blocks=blocks[::2])
    assert draw_cluster_grid(picture, made).tobytes() == chosen.tobytes()


@pytest.mark.parametrize("draw", [draw_cluster_grid, draw_cluster_frames])
def test_other_types_are_refused(draw, recording, picture):
    with pytest.raises(TypeError, match="`recording` must be a Recording, got NoneType"):
        draw(picture, None)
    with pytest.raises(TypeError, match="`image` must be a PIL image, got str"):
        draw("picture.png", recording)


def test_nothing_to_draw(recording, picture):
    for step in recording.steps:
        step.partitions.pop(BLOCKS[1], None)
    with pytest.raises(ValueError, match="must have merged tokens in some step"):
        draw_cluster_frames(picture, recording, BLOCKS[1])
    recording.steps.clear()
    for draw in (draw_cluster_grid, draw_cluster_frames):
        with pytest.raises(ValueError, match="must have steps"):
            draw(picture, recording)
