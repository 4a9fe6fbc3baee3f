"""One partition drawn over a picture, as in the papers of ToMe and ATC."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sd_tokenmerge.report.contact_sheet import label_font

_LEAST_TOKEN = 8
"""Height and width of a token in pixels below which a picture is enlarged."""
_NUMBERED_CLUSTERS = 3
_NUMBERED_SHARE = 1 / 64
"""Clusters with a smaller share of the tokens have no room for a number."""
_TEXT = 11
_NUMBER_SIZE = (16, 32)
"""Height and width of a written number in pixels."""


def draw_clusters(image: Image.Image, labels: NDArray[np.integer[Any]]) -> Image.Image:
    """Draw one partition over a picture.

    Each cluster has the mean colour of its pixels, even if it lies in several pieces. A border
    separates neighbours of different clusters. The three largest clusters show how many tokens
    they have, if those are at least 1/64 of all tokens.

    Args:
        image: the generated picture.
        labels: `[rows, columns]`, integers from 0; the cluster of each token. The tokens divide the
            picture into equal rectangles.

    Returns:
        The drawing, RGB; as large as the picture, or a multiple of it that gives every token at
        least 8 pixels.

    Raises:
        ValueError: `labels` has the wrong form.
    """
    if labels.ndim != 2 or labels.size == 0 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            "`labels` must be a grid of integers from 0, got "
            f"{labels.dtype} of shape {list(labels.shape)}."
        )
    rows, columns = labels.shape
    factor = max(1, ceil(_LEAST_TOKEN * max(rows / image.height, columns / image.width)))
    size = (image.width * factor, image.height * factor)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    clusters = labels[np.ix_(_token_of(size[1], rows), _token_of(size[0], columns))]
    drawing = _mean_colours(pixels, clusters)[clusters]
    borders = _borders(clusters)
    drawing[borders] = _border_colours(drawing[borders])
    drawn = Image.fromarray(drawing.round().astype(np.uint8))
    _write_sizes(drawn, labels)
    return drawn


def _token_of(length: int, tokens: int) -> NDArray[np.int64]:
    """The index of the token that covers each of `length` pixels."""
    return np.arange(length) * tokens // length


def _mean_colours(
    pixels: NDArray[np.uint8], clusters: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """`[K, 3]` from `[height, width, 3]` pixels and their clusters; 0 for unused labels."""
    flat = clusters.ravel()
    sums = [np.bincount(flat, channel.ravel()) for channel in np.moveaxis(pixels, -1, 0)]
    return np.stack(sums, -1) / np.maximum(np.bincount(flat), 1)[:, None]


def _borders(clusters: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """The pixels that have another cluster above or to the left."""
    borders = np.zeros(clusters.shape, bool)
    borders[1:] |= clusters[1:] != clusters[:-1]
    borders[:, 1:] |= clusters[:, 1:] != clusters[:, :-1]
    return borders


def _border_colours(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """A darker shade of each colour, or a lighter one of dark colours."""
    is_dark = colours.max(-1, keepdims=True) < 64
    return np.where(is_dark, colours + 64, 0.55 * colours)


def _write_sizes(drawn: Image.Image, labels: NDArray[np.integer[Any]]) -> None:
    """Write the sizes of the largest clusters, each on the token nearest to the centre.

    Tokens where the number would overlap another one are passed over.
    """
    draw = ImageDraw.Draw(drawn)
    scale = np.divide((drawn.height, drawn.width), labels.shape)
    sizes = np.bincount(labels.ravel())
    written: list[NDArray[np.float64]] = []
    for cluster in np.argsort(-sizes, kind="stable")[:_NUMBERED_CLUSTERS]:
        if sizes[cluster] < labels.size * _NUMBERED_SHARE:
            break
        tokens = (np.argwhere(labels == cluster) + 0.5) * scale
        distances = ((tokens - tokens.mean(0)) ** 2).sum(1)
        for other in written:
            distances[(np.abs(tokens - other) < _NUMBER_SIZE).all(1)] = np.inf
        if np.isinf(distances.min()):
            continue
        place = tokens[distances.argmin()]
        written.append(place)
        draw.text(
            (place[1], place[0]),
            f"{sizes[cluster]:,}",
            fill="white",
            font=label_font(_TEXT),
            anchor="mm",
            stroke_width=2,
            stroke_fill="black",
        )
