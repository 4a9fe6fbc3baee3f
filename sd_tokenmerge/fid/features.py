"""Features of an image set: extracted once, then read from the cache.

The cache key is the content: the SHA-256 of every file in order, the network's weights, the
protocol and the precision. Renaming a folder keeps the entry; changing one pixel makes a new one.

With several processes (`accelerate launch`, `torchrun`), process `rank` of `count` extracts images
`rank, rank + count, rank + 2 count, ...`, and all receive the whole set in the usual order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import Gaussian
from sd_tokenmerge.fid.extraction import extract
from sd_tokenmerge.fid.extractors import Extractor, find_extractor
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.preprocess import find_protocol
from sd_tokenmerge.fid.storage import (
    Array,
    StorageError,
    default_cache_folder,
    read_arrays,
    write_arrays,
)
from sd_tokenmerge.files import file_sha256, remove_leftovers
from sd_tokenmerge.processes import Processes

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FeatureSpace:
    """Everything that two sets of features must share to be comparable.

    Attributes:
        extractor: name of the network.
        protocol: name of the image preparation.
        precision: of the network's arithmetic, a key of `PRECISIONS`.
        weights_sha256: of the network's weight file; None if unknown (a foreign file).
        assumed: whether the user stated extractor and protocol of a file that does not.

    Raises:
        TypeError: an attribute is of another type.
    """

    extractor: str
    protocol: str
    precision: str = "float32"
    weights_sha256: str | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        texts = (self.extractor, self.protocol, self.precision, self.weights_sha256 or "")
        if not all(isinstance(text, str) for text in texts) or type(self.assumed) is not bool:
            raise TypeError(f"A feature space must consist of names, got {vars(self)}")

    def __str__(self) -> str:
        weights = (self.weights_sha256 or "unknown")[:8]
        text = f"{self.extractor} (weights {weights}), protocol {self.protocol}, {self.precision}"
        return text + " (assumed)" if self.assumed else text

    def require_same(self, other: FeatureSpace) -> None:
        """Check that features of both spaces may be compared; unknown weights match any.

        Raises:
            ValueError: networks, weights, protocols or precisions differ; the message names both.
        """
        same = (self.extractor, self.protocol, self.precision) == (
            other.extractor,
            other.protocol,
            other.precision,
        )
        known = self.weights_sha256 is not None and other.weights_sha256 is not None
        if not same or (known and self.weights_sha256 != other.weights_sha256):
            raise ValueError(f"The two sets have different features: {self} and {other}.")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of an image set.

    Attributes:
        features: `[N, D]` float32 on the CPU, finite.
        files: N paths relative to the folder, POSIX style, sorted; empty if unknown (a foreign
            file).
        hashes: N SHA-256 digests of the files; empty if `files` is.
        space: network, image preparation and precision.
        from_cache: whether they were read instead of computed.
    """

    features: Tensor
    files: tuple[str, ...]
    hashes: tuple[str, ...]
    space: FeatureSpace
    from_cache: bool = False

    @property
    def num_images(self) -> int:
        """N."""
        return self.features.shape[0]

    @cached_property
    def gaussian(self) -> Gaussian:
        """The normal distribution fitted to the features.

        Raises:
            ValueError: there are fewer than two images.
        """
        return Gaussian.from_features(self.features)

    @property
    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs (first, later) of files with the same bytes; both count as images."""
        first: dict[str, str] = {}
        return [
            (first[digest], file)
            for file, digest in zip(self.files, self.hashes, strict=True)
            if first.setdefault(digest, file) != file
        ]


def extract_features(
    folder: str | os.PathLike[str],
    *,
    extractor: str | Extractor = "inception",
    protocol: str = "atc",
    weights: str | os.PathLike[str] | None = None,
    download_weights: bool = False,
    allow_unknown_weights: bool = False,
    precision: str = "float32",
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    cache: str | os.PathLike[str] | bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """Extract the features of every image in a folder, or read them from the cache.

    Args:
        folder: images, found recursively and taken in the order of their relative paths.
        extractor: a name from `EXTRACTORS`, or an `Extractor` of your own.
        protocol: a name from `PROTOCOLS`: how images are resized and scaled.
        weights: weight file (or model folder, for CLIP and DINOv2); default: the usual places.
        download_weights: fetch missing weights.
        allow_unknown_weights: accept weights that are not the public ones.
        precision: `"float32"`, or `"bfloat16"` or `"float16"` for automatic mixed precision, which
            is faster on a GPU and a different feature space.
        batch_size: images per forward pass.
        num_workers: threads that read and resize; default: one per usable processor, at most 16.
        device: default: CUDA, else MPS, else the CPU.
        cache: False for none, True for the default folder, or the folder.
        progress: called with (images done, total), first with 0; not on a cache hit.

    Returns:
        The features on the CPU; the same on every process.

    Raises:
        ValueError: the folder, an argument or an image (`ImageError`) cannot be used, the weights
            are missing (`WeightsError`), or the network gave NaN or infinity for an image.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    resizing = find_protocol(protocol)
    if isinstance(extractor, str):
        extractor = find_extractor(
            extractor,
            resizing,
            weights,
            download=download_weights,
            allow_unknown=allow_unknown_weights,
        )
    space = FeatureSpace(extractor.name, protocol, precision, extractor.weights_sha256)
    processes = Processes.join(device)
    paths = find_images(folder)
    hashes = [file_sha256(path) for path in paths]
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    entry = None if cache is False else _cache_folder(cache) / f"{_key(space, hashes)}.npz"

    shape = len(paths), extractor.num_features
    cached = _read_entry(entry, shape) if entry is not None and processes.is_first else None
    features = processes.broadcast(cached)
    from_cache = features is not None
    if features is None:
        features = extract(
            paths,
            extractor,
            resizing.resize,
            autocast=PRECISIONS[precision],
            batch_size=batch_size,
            num_workers=num_workers,
            processes=processes,
            progress=progress,
        )
        if entry is not None and processes.is_first:
            _write_entry(entry, features, space)
    return FeatureSet(features, names, tuple(hashes), space, from_cache)


def _read_entry(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Features of a cache entry; None if there is none or it is damaged (which is logged)."""
    if not path.is_file():
        return None
    try:
        arrays = read_arrays(path, ("features", "sha256"))
        features = arrays["features"]
        if features.shape != shape or str(arrays["sha256"]) != _array_sha256(features):
            raise StorageError(f"{str(path)!r} does not match its checksum.")
    except (StorageError, KeyError) as error:
        logger.warning("A damaged cache entry is computed again: %s", error)
        return None
    return torch.from_numpy(features)


def _write_entry(path: Path, features: Tensor, space: FeatureSpace) -> None:
    """Write a cache entry with its checksum; a folder that cannot be written is only a warning."""
    array = features.numpy()
    arrays = {
        "features": array,
        "sha256": np.array(_array_sha256(array)),
        "space": np.array(json.dumps(asdict(space))),
    }
    try:
        write_arrays(path, arrays)
        remove_leftovers(path.parent)
    except OSError as error:
        logger.warning("Features are not cached in %r: %s", str(path.parent), error)


def _cache_folder(cache: str | os.PathLike[str] | bool) -> Path:
    base = default_cache_folder() if isinstance(cache, bool) else Path(cache)
    return base / "features"


def _key(space: FeatureSpace, hashes: Sequence[str]) -> str:
    content = {"format": CACHE_FORMAT, "space": asdict(space), "files": list(hashes)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _array_sha256(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
