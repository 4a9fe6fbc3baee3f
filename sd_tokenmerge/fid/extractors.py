"""The networks whose features are compared, by name.

To add one, write a function that returns an `Extractor` and enter it in `EXTRACTORS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol as TypingProtocol

from torch import Tensor, nn

from sd_tokenmerge.fid import efficientnet_lite, inception
from sd_tokenmerge.fid import vision_transformers as vit
from sd_tokenmerge.fid.efficientnet_lite import find_efficientnet_weights, load_efficientnet
from sd_tokenmerge.fid.inception_weights import (
    WeightsError,
    download_inception_weights,
    find_inception_weights,
    load_inception,
    verify_inception_weights,
)
from sd_tokenmerge.fid.preprocess import Protocol
from sd_tokenmerge.files import file_sha256


@dataclass(frozen=True)
class Extractor:
    """A network, described before it is loaded: a cached set needs only the description.

    Attributes:
        name: key in `EXTRACTORS`.
        image_size: side of the square input in pixels.
        num_features: D.
        weights_sha256: of the weight file.
        normalize: pixels in [0, 255] to the network's input.
        load: builds the network, `[B, 3, size, size] -> [B, D]`, on the CPU, in evaluation mode.
    """

    name: str
    image_size: int
    num_features: int
    weights_sha256: str
    normalize: Callable[[Tensor], Tensor]
    load: Callable[[], nn.Module]


class ExtractorFactory(TypingProtocol):
    """Describes an extractor; finds and checks its weights, but does not load them."""

    def __call__(
        self,
        protocol: Protocol,
        weights: str | os.PathLike[str] | None,
        *,
        download: bool,
        allow_unknown: bool,
    ) -> Extractor:
        """See `find_extractor`."""


def inception_extractor(
    protocol: Protocol,
    weights: str | os.PathLike[str] | None,
    *,
    download: bool,
    allow_unknown: bool,
) -> Extractor:
    """The FID Inception-v3: 2,048 features of 299x299 pixels."""
    path = (
        download_inception_weights()
        if download and weights is None
        else find_inception_weights(weights)
    )
    return Extractor(
        "inception",
        inception.IMAGE_SIZE,
        inception.NUM_FEATURES,
        verify_inception_weights(path, allow_unknown=allow_unknown),
        protocol.normalize,
        partial(load_inception, path),
    )


def efficientnet_extractor(
    protocol: Protocol,
    weights: str | os.PathLike[str] | None,
    *,
    download: bool,
    allow_unknown: bool,
) -> Extractor:
    """EfficientNet-Lite0: 1,280 features of 224x224 pixels; weights from its package."""
    path = find_efficientnet_weights() if weights is None else Path(weights)
    if not path.is_file():
        raise WeightsError(f"`weights` must name an existing file, got {str(path)!r}.")
    digest = file_sha256(path)
    if not allow_unknown and not digest.startswith("57934424"):
        raise WeightsError(
            f"{str(path)!r} is not {efficientnet_lite.WEIGHTS_FILE} (its sha256 begins with "
            f"{digest[:8]}). `allow_unknown_weights` uses it nevertheless."
        )
    return Extractor(
        "efficientnet-lite0",
        efficientnet_lite.IMAGE_SIZE,
        efficientnet_lite.NUM_FEATURES,
        digest,
        lambda pixels: (pixels - 127) / 128,
        partial(load_efficientnet, path),
    )


def clip_extractor(
    protocol: Protocol,
    weights: str | os.PathLike[str] | None,
    *,
    download: bool,
    allow_unknown: bool,
) -> Extractor:
    """A CLIP image encoder; any checkpoint, so its digest is part of the result."""
    folder = vit.find_model(weights or vit.CLIP_MODEL, download=download)
    size, num_features = vit.clip_size_and_features(folder)
    return Extractor(
        "clip",
        size,
        num_features,
        vit.model_sha256(folder),
        vit.standardize_clip,
        partial(vit.load_clip, folder),
    )


def dinov2_extractor(
    protocol: Protocol,
    weights: str | os.PathLike[str] | None,
    *,
    download: bool,
    allow_unknown: bool,
) -> Extractor:
    """A DINOv2 image encoder; any checkpoint, so its digest is part of the result."""
    folder = vit.find_model(weights or vit.DINOV2_MODEL, download=download)
    return Extractor(
        "dinov2",
        vit.DINOV2_SIZE,
        vit.dinov2_features(folder),
        vit.model_sha256(folder),
        vit.standardize_imagenet,
        partial(vit.load_dinov2, folder),
    )


EXTRACTORS: dict[str, ExtractorFactory] = {
    "inception": inception_extractor,
    "efficientnet-lite0": efficientnet_extractor,
    "clip": clip_extractor,
    "dinov2": dinov2_extractor,
}


def find_extractor(
    name: str,
    protocol: Protocol,
    weights: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    allow_unknown: bool = False,
) -> Extractor:
    """Look an extractor up by name and find its weights.

    Args:
        name: a key of `EXTRACTORS`.
        protocol: the Inception network's input scaling depends on it.
        weights: weight file (or model folder or hub id, for CLIP and DINOv2); None searches the
            places where they usually are.
        download: fetch missing weights.
        allow_unknown: accept weights whose checksum is not that of the public file.

    Raises:
        ValueError: there is no such extractor.
        WeightsError: its weights are missing or wrong.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"`extractor` must be one of {', '.join(EXTRACTORS)}, got {name!r}.")
    return EXTRACTORS[name](protocol, weights, download=download, allow_unknown=allow_unknown)
