"""How much each picture changed: PSNR, SSIM and feature distance to the unmerged picture.

Pictures of the same file name come from the same prompt and seed. These numbers are far more
sensitive than a distance between sets, but they measure difference, not loss of quality.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, isinf
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_tokenmerge.fid.features import FeatureSet
from sd_tokenmerge.fid.images import find_images, read_image
from sd_tokenmerge.machine import usable_cores

_SMALLEST_SIDE = 11  # SSIM's window


@dataclass(frozen=True)
class ImageChange:
    """One picture compared with its unmerged counterpart.

    Attributes:
        file: path relative to both folders.
        psnr: peak signal-to-noise ratio in dB; infinite for equal pictures.
        ssim: structural similarity (Wang et al. 2004; Gaussian window of 11, edges mirrored, mean
            over the colour channels), at most 1.
        feature_distance: Euclidean distance of the two feature vectors; None without features.
    """

    file: str
    psnr: float
    ssim: float
    feature_distance: float | None = None


@dataclass(frozen=True)
class PairedChange:
    """All pictures of a folder compared with their unmerged counterparts."""

    images: tuple[ImageChange, ...]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.images)

    @property
    def num_identical(self) -> int:
        """Number of pictures with exactly the same pixels."""
        return sum(isinf(image.psnr) for image in self.images)

    @property
    def psnr(self) -> float:
        """Mean PSNR in dB of the pictures that differ; infinite if none does."""
        finite = [image.psnr for image in self.images if not isinf(image.psnr)]
        return sum(finite) / len(finite) if finite else inf

    @property
    def ssim(self) -> float:
        """Mean SSIM."""
        return sum(image.ssim for image in self.images) / len(self.images)

    @property
    def feature_distance(self) -> float | None:
        """Mean feature distance; None without features."""
        distances = [image.feature_distance for image in self.images]
        known = [distance for distance in distances if distance is not None]
        return sum(known) / len(known) if known else None


def paired_change(
    baseline: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    features: tuple[FeatureSet, FeatureSet] | None = None,
) -> PairedChange:
    """Compare every picture with the one of the same name in the baseline.

    Args:
        baseline: folder of the unmerged pictures; may hold more than `folder`.
        folder: pictures to compare.
        features: features of (baseline, folder), for `feature_distance`.

    Raises:
        ValueError: a picture has no counterpart of the same size, a file cannot be read, or
            `features` are of other images or networks.
    """
    baseline, folder = Path(baseline), Path(folder)
    paths = find_images(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    known = {path.relative_to(baseline).as_posix() for path in find_images(baseline)}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"Every image in {str(folder)!r} must have one of the same name in {str(baseline)!r}; "
            f"{len(missing)} of {len(names)} have none, the first being {missing[0]!r}."
        )
    distances = _feature_distances(features, names)
    with ThreadPoolExecutor(min(usable_cores(), 16)) as pool:
        compared = list(pool.map(_compare, paths, [baseline / name for name in names]))
    return PairedChange(
        tuple(
            ImageChange(name, psnr, ssim, distance)
            for name, (psnr, ssim), distance in zip(names, compared, distances, strict=True)
        )
    )


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures of the same size; maybe infinite."""
    return _psnr(_pixels(image), _pixels(original))


def _psnr(pixels: Tensor, target: Tensor) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(pixels, target, data_range=255.0))


def _pixels(image: Image.Image) -> Tensor:
    """`[1, 3, height, width]` float32 in [0, 255]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float32)


def _compare(path: Path, twin: Path) -> tuple[float, float]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    image, original = read_image(path), read_image(twin)
    if image.size != original.size:
        raise ValueError(
            f"{str(path)!r} and {str(twin)!r} must have the same size, "
            f"got {image.width}x{image.height} and {original.width}x{original.height}."
        )
    if min(image.size) < _SMALLEST_SIDE:
        raise ValueError(
            f"{str(path)!r} must be at least {_SMALLEST_SIDE} pixels wide and high for SSIM, "
            f"got {image.width}x{image.height}."
        )
    pixels, target = map(_pixels, (image, original))
    ssim = float(structural_similarity_index_measure(pixels, target, data_range=255.0))
    return _psnr(pixels, target), ssim


def _feature_distances(
    features: tuple[FeatureSet, FeatureSet] | None, names: Sequence[str]
) -> list[float] | list[None]:
    if features is None:
        return [None] * len(names)
    original, changed = features
    original.space.require_same(changed.space)
    row = {name: index for index, name in enumerate(original.files)}
    if list(changed.files) != list(names) or not row.keys() >= set(names):
        raise ValueError("`features` must be of the images in `baseline` and `folder`.")
    twins: Tensor = original.features[[row[name] for name in names]]
    return (changed.features - twins).double().norm(dim=1).tolist()  # type: ignore[no-any-return]
