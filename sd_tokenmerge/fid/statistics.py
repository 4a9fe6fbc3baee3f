"""Saved statistics: ours with all metadata, and those of pytorch-fid, clean-fid and ADM.

| written by | arrays | read as |
|---|---|---|
| this package | `features`, `mu`, `sigma`, `files`, `hashes`, `metadata` | a feature set |
| clean-fid (KID) | `feats` | a feature set, if its protocol is given |
| pytorch-fid, clean-fid (FID), TTUR | `mu`, `sigma` | a distribution, if its protocol is given |
| ADM (guided-diffusion) | also `mu_s`, `sigma_s`, `arr_0`, which are ignored | the same |

A foreign file says neither how its images were resized nor how many there were.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import Gaussian, require_features
from sd_tokenmerge.fid.features import FeatureSet, FeatureSpace
from sd_tokenmerge.fid.preprocess import find_protocol
from sd_tokenmerge.fid.storage import Array, StorageError, read_arrays, write_arrays
from sd_tokenmerge.files import parse_json

_FORMAT = "sd-tokenmerge statistics 1"
_ARRAYS = ("metadata", "features", "files", "hashes", "feats", "mu", "sigma")


@dataclass(frozen=True, eq=False)
class Statistics:
    """A mean and a covariance without the features they came from.

    Attributes:
        gaussian: the distribution.
        space: network, image preparation and precision.
    """

    gaussian: Gaussian
    space: FeatureSpace

    @property
    def num_images(self) -> int | None:
        """N, or None if the file does not say."""
        return self.gaussian.num_images


def save_statistics(features: FeatureSet, path: str | os.PathLike[str]) -> None:
    """Write a set's features, mean, covariance, file names and hashes, and metadata.

    pytorch-fid and clean-fid can read the file too (`mu`, `sigma`).

    Args:
        features: the set.
        path: ends in `.npz`; appears only when complete.

    Raises:
        ValueError: `path` does not end in `.npz`, or the set has no file names or fewer than two
            images.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz, got {str(path)!r}.")
    require_features(features.features)
    if not features.files:
        raise ValueError("`features` must have file names, got features of a foreign file.")
    values = features.features.to(torch.float64)
    metadata = {
        "format": _FORMAT,
        "space": asdict(features.space),
        "num_images": features.num_images,
    }
    arrays: dict[str, Array] = {
        "features": features.features.numpy(),
        "mu": values.mean(0).numpy(),
        "sigma": torch.cov(values.T).numpy(),
        "files": np.array(features.files, dtype=np.str_),
        "hashes": np.array(features.hashes, dtype=np.str_),
        "metadata": np.array(json.dumps(metadata)),
    }
    write_arrays(path, arrays)


def load_statistics(
    path: str | os.PathLike[str],
    *,
    assume_protocol: str | None = None,
    assume_extractor: str = "inception",
) -> FeatureSet | Statistics:
    """Read saved statistics of any of the formats above.

    Args:
        path: an `.npz` file; nothing in it is unpickled.
        assume_protocol: protocol of a foreign file, required there; must agree with the protocol
            that a file of this package records.
        assume_extractor: the network of a foreign file.

    Raises:
        ValueError: the file does not exist, is damaged (`StorageError`) or has fewer than two
            images, or `assume_protocol` is missing, unknown or contradicted.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"The statistics file {str(path)!r} does not exist.")
    arrays = read_arrays(path, _ARRAYS)
    if "metadata" in arrays:
        ours = _feature_set(path, arrays)
        if assume_protocol not in (None, ours.space.protocol):
            raise ValueError(
                f"{str(path)!r} was made with the protocol {ours.space.protocol}, which "
                f"contradicts `assume_protocol`, got {assume_protocol!r}."
            )
        return ours
    if not ("feats" in arrays or ("mu" in arrays and "sigma" in arrays)):
        raise StorageError(
            f"{str(path)!r} must hold `mu` and `sigma`, or `feats`, "
            f"got {', '.join(sorted(arrays)) or 'none of them'}."
        )
    if assume_protocol is None:
        raise ValueError(
            f"{str(path)!r} does not say how its images were resized: name the protocol with "
            "`assume_protocol`, or make the file again from the images."
        )
    find_protocol(assume_protocol)
    space = FeatureSpace(assume_extractor, assume_protocol, assumed=True)
    try:
        if "feats" in arrays:
            return FeatureSet(_features(arrays["feats"]), (), (), space, from_cache=True)
        mean, covariance = _tensor(arrays["mu"]), _tensor(arrays["sigma"])
        return Statistics(Gaussian.from_statistics(mean, covariance), space)
    except ValueError as error:
        raise StorageError(f"{str(path)!r} has unusable statistics: {error}") from error


def _feature_set(path: Path, arrays: dict[str, Array]) -> FeatureSet:
    """Check all of a file that this package wrote."""
    try:
        metadata = parse_json(str(arrays["metadata"]), "`metadata`")
        if metadata["format"] != _FORMAT:
            raise StorageError(f"{str(path)!r} has the unknown format {metadata['format']!r}.")
        space = FeatureSpace(**metadata["space"])
        features = _features(arrays["features"])
        files, hashes = _texts(arrays["files"]), _texts(arrays["hashes"])
    except StorageError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{str(path)!r} is damaged or incomplete: {error}") from error
    if not len(files) == len(set(files)) == len(hashes) == len(features):
        raise StorageError(
            f"{str(path)!r} must have a file name and a hash for each of its {len(features)} "
            f"images, got {len(set(files))} different names and {len(hashes)} hashes."
        )
    return FeatureSet(features, files, hashes, space, from_cache=True)


def _features(array: Array) -> Tensor:
    features = _tensor(array).to(torch.float32)
    require_features(features)
    return features


def _tensor(array: Array) -> Tensor:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`mu`, `sigma` and features must be floating point, got {array.dtype}.")
    return torch.from_numpy(array)


def _texts(array: Array) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"File names and hashes must be lists of text, got {array.dtype}.")
    return tuple(array.tolist())
