"""The feature networks, by name.

To add one, write a function from a `Request` to an `Extractor` and register it in `EXTRACTORS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_tokenmerge.fid import efficientnet_lite, inception
from sd_tokenmerge.fid import vision_transformers as vit
from sd_tokenmerge.fid.inception_weights import (
    WeightsError,
    download_inception_weights,
    find_inception_weights,
    load_inception,
    verify_inception_weights,
)
from sd_tokenmerge.fid.preprocess import Protocol
from sd_tokenmerge.files import file_sha256

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


@dataclass(frozen=True)
class Request:
    """The user's settings of an extractor.

    Attributes:
        protocol: the Inception network's input scaling depends on it.
        weights: weight file (or model folder or hub id, for CLIP and DINOv2); None for the usual
            places.
        download: fetch missing weights.
        allow_unknown: accept weights whose checksum is not that of the public file.
    """

    protocol: Protocol
    weights: str | os.PathLike[str] | None = None
    download: bool = False
    allow_unknown: bool = False


def find_extractor(
    name: str,
    protocol: Protocol,
    weights: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    allow_unknown: bool = False,
) -> Extractor:
    """Look up an extractor; finds and checks its weights, but does not load them.

    Args:
        name: a key of `EXTRACTORS`.
        protocol: like the other arguments, documented in `Request`.
        weights: weight file or model.
        download: fetch missing weights.
        allow_unknown: accept unknown weights.

    Raises:
        ValueError: there is no such extractor.
        WeightsError: its weights are missing or wrong.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"`extractor` must be one of {', '.join(EXTRACTORS)}, got {name!r}.")
    return EXTRACTORS[name](Request(protocol, weights, download, allow_unknown))


def inception_extractor(request: Request) -> Extractor:
    """The FID Inception-v3: 2,048 features of 299x299 pixels."""
    if request.download and request.weights is None:
        path = download_inception_weights()
    else:
        path = find_inception_weights(request.weights)
    return Extractor(
        "inception",
        inception.IMAGE_SIZE,
        inception.NUM_FEATURES,
        verify_inception_weights(path, allow_unknown=request.allow_unknown),
        request.protocol.normalize,
        partial(load_inception, path),
    )


def efficientnet_extractor(request: Request) -> Extractor:
    """EfficientNet-Lite0: 1,280 features of 224x224 pixels; weights from its package."""
    if request.weights is None:
        path = efficientnet_lite.find_efficientnet_weights()
    else:
        path = Path(request.weights)
    if not path.is_file():
        raise WeightsError(f"`weights` must name an existing file, got {str(path)!r}.")
    digest = file_sha256(path)
    if not request.allow_unknown and not digest.startswith("57934424"):
        raise WeightsError(
            f"{str(path)!r} is not {efficientnet_lite.WEIGHTS_FILE} (its sha256 begins with "
            f"{digest[:8]}). `allow_unknown_weights` uses it anyway."
        )
    return Extractor(
        "efficientnet-lite0",
        efficientnet_lite.IMAGE_SIZE,
        efficientnet_lite.NUM_FEATURES,
        digest,
        lambda pixels: (pixels - 127) / 128,
        partial(efficientnet_lite.load_efficientnet, path),
    )


def clip_extractor(request: Request) -> Extractor:
    """A CLIP image encoder; any checkpoint, so its digest is part of the result."""
    folder = vit.find_model(request.weights or vit.CLIP_MODEL, download=request.download)
    size, num_features = vit.clip_size_and_features(folder)
    return Extractor(
        "clip",
        size,
        num_features,
        vit.model_sha256(folder),
        partial(_standardize, _CLIP_MEAN, _CLIP_STD),
        partial(vit.load_clip, folder),
    )


def dinov2_extractor(request: Request) -> Extractor:
    """A DINOv2 image encoder; any checkpoint, so its digest is part of the result."""
    folder = vit.find_model(request.weights or vit.DINOV2_MODEL, download=request.download)
    return Extractor(
        "dinov2",
        vit.DINOV2_SIZE,
        int(vit.read_config(folder, "DINOv2", "dinov2").hidden_size),
        vit.model_sha256(folder),
        partial(_standardize, _IMAGENET_MEAN, _IMAGENET_STD),
        partial(vit.load_dinov2, folder),
    )


EXTRACTORS: dict[str, Callable[[Request], Extractor]] = {
    "inception": inception_extractor,
    "efficientnet-lite0": efficientnet_extractor,
    "clip": clip_extractor,
    "dinov2": dinov2_extractor,
}


def _standardize(mean: tuple[float, ...], std: tuple[float, ...], pixels: Tensor) -> Tensor:
    means, stds = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std)
    )
    return (pixels / 255 - means) / stds
