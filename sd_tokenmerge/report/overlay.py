"""A recording drawn over the generated picture: steps by blocks, and frame by frame."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from sd_tokenmerge.report.clusters import draw_clusters
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet, label_font

if TYPE_CHECKING:
    from sd_tokenmerge.patching.recording import Recording

_TEXT = 11
_SHOWN = 5
"""Steps and blocks that are drawn by default."""
_FRAME_MS, _LAST_FRAME_MS = 250, 1500


def draw_cluster_grid(
    image: Image.Image,
    recording: Recording,
    *,
    steps: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    row: int = -1,
    frame: int = 0,
) -> Image.Image:
    """Draw the clusters of chosen steps (down) and blocks (across) over a picture.

    Args:
        image: the generated picture.
        recording: of the generation; see `PatchHandle.record`.
        steps: indices in `recording.steps`; None: five, from the first to the last.
        blocks: names in `recording.blocks`; None: up to five, from the first to the last.
        row: of the batch that the denoiser gets. With classifier-free guidance, diffusers puts the
            unconditional half first, so -1 is the last picture, with its prompt. A UNet for videos
            gets each frame as a row.
        frame: of the row, 0 for an image. Transformers for videos attend to the tokens of several
            frames at once.

    Returns:
        The sheet, RGB. Cells of blocks that merged nothing in a step are empty.

    Raises:
        ValueError: nothing was recorded, there is no such step, block, row or frame, or the tokens
            of a picture are not about square.
    """
    _require_inputs(image, recording)
    count = len(recording.steps)
    if steps is None:
        steps = _spread(count)
    for step in steps:
        if not 0 <= step < count:
            raise ValueError(f"`steps` must be in [0, {count}), got {step}.")
    if blocks is None:
        blocks = [recording.blocks[i] for i in _spread(len(recording.blocks))]
    cells = [[_cell(image, recording, s, block, row, frame) for block in blocks] for s in steps]
    grid = PictureGrid(
        heading="",
        rows=[f"step {s + 1}:t={recording.steps[s].timestep:.4g}" for s in steps],
        columns=[_short(block) for block in blocks],
        cells=cells,
    )
    largest = max((max(cell.size) for line in cells for cell in line if cell), default=256)
    caption = (
        "Each cluster of tokens has the mean colour of its pixels; numbers: tokens of the largest "
        "clusters."
    )
    return contact_sheet([grid], cell=largest, caption=caption)


def draw_cluster_frames(
    image: Image.Image,
    recording: Recording,
    block: str | None = None,
    *,
    row: int = -1,
    frame: int = 0,
) -> list[Image.Image]:
    """Draw the clusters of one block, a picture for each step in which it merged.

    Args:
        image: the generated picture.
        recording: of the generation.
        block: a name in `recording.blocks`; None: the first.
        row: as for `draw_cluster_grid`.
        frame: as for `draw_cluster_grid`.

    Raises:
        ValueError: as for `draw_cluster_grid`, or the block merged nothing.
    """
    _require_inputs(image, recording)
    block = recording.blocks[0] if block is None else block
    count = len(recording.steps)
    frames = []
    for step in range(count):
        cell = _cell(image, recording, step, block, row, frame)
        if cell is not None:
            timestep = recording.steps[step].timestep
            title = f"{_short(block)}, step {step + 1} of {count}, t={timestep:.4g}"
            frames.append(_with_line(cell, title, above=True))
    if not frames:
        raise ValueError(f"`block` must have merged tokens in some step, got {block!r}.")
    return frames


def save_animation(frames: Sequence[Image.Image], path: str | Path) -> None:
    """Save frames as an endless GIF, a quarter of a second each and the last for longer.

    Raises:
        OSError: the file cannot be written.
    """
    times = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    first, *others = frames
    first.save(path, format="gif", save_all=True, append_images=others, duration=times, loop=0)


def _require_inputs(image: Image.Image, recording: Recording) -> None:
    from sd_tokenmerge.patching.recording import Recording

    if not isinstance(image, Image.Image):
        raise TypeError(f"`image` must be a PIL image, got {type(image).__name__}.")
    if not isinstance(recording, Recording):
        raise TypeError(
            f"`recording` must be a Recording, got {type(recording).__name__}; see "
            f"`PatchHandle.record`."
        )
    if not recording.steps:
        raise ValueError("`recording` must have steps: generate a picture inside its `with` block.")


def _spread(count: int) -> list[int]:
    """Indices from the first to the last of `count`."""
    return sorted({round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)})


def _cell(
    image: Image.Image,
    recording: Recording,
    step: int,
    block: str,
    row: int,
    frame: int,
) -> Image.Image | None:
    if block not in recording.blocks:
        known = ", ".join(recording.blocks)
        raise ValueError(f"`block` must be a merged block ({known}), got {block!r}.")
    recorded = recording.steps[step].partitions.get(block)
    if recorded is None:
        return None
    batch = len(recorded.labels)
    if not -batch <= row < batch:
        raise ValueError(f"`row` must be in [-{batch}, {batch}), got {row}.")
    video = recorded.labels[row]
    if not 0 <= frame < len(video):
        raise ValueError(f"`frame` must be in [0, {len(video)}), got {frame}.")
    labels, sizes = video[frame], np.bincount(video.ravel())
    aspect = image.width / labels.shape[1] / (image.height / labels.shape[0])
    if not 2 / 3 < aspect < 3 / 2:
        raise ValueError(
            f"`image` must have the shape of the {labels.shape[0]}x{labels.shape[1]} tokens, got "
            f"{image.height}x{image.width} pixels."
        )
    text = f"{len(sizes):,} clusters of {sizes.min():,} to {sizes.max():,} tokens"
    return _with_line(draw_clusters(image, labels), text)


def _with_line(picture: Image.Image, text: str, *, above: bool = False) -> Image.Image:
    """A picture with a line of text below or above."""
    line = round(1.6 * _TEXT)
    out = Image.new("RGB", (picture.width, picture.height + line), "white")
    out.paste(picture, (0, line if above else 0))
    middle = (picture.width / 2, line / 2 if above else picture.height + line / 2)
    ImageDraw.Draw(out).text(middle, text, fill="#1a1a1a", font=label_font(_TEXT), anchor="mm")
    return out


def _short(block: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0` as `down 0.1.0`."""
    place, *rest = re.sub(r"_blocks?|\.(attentions|transformer_blocks)\b", "", block).split(".")
    return f"{place} {'.'.join(rest)}"
