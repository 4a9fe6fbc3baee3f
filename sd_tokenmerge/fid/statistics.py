"""Saved statistics: ours with all metadata, and those of pytorch-fid, clean-fid and ADM.

| written by | arrays | read as |
|---|---|---|
| this package | `features`, `mu`, `sigma`, `files`, `hashes`, `metadata` | a feature set |
| clean-fid (KID) | `feats` | a feature set, once told the protocol |
| pytorch-fid, clean-fid (FID), TTUR | `mu`, `sigma` | a distribution, once told the protocol |
| ADM (guided-diffusion) | also `mu_s`, `sigma_s`, `arr_0`, which are not read | the same |

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

_FORMAT = "sd-tokenmerge statistics 1"
_ARRAYS = {"features", "feats", "mu", "sigma", "files", "hashes", "metadata"}


@dataclass(frozen=True, eq=False)
class Statistics:
    """A mean and a covariance without the features they came from.

    Attributes:
        gaussian: the distribution; its `num_images` is None where the file does not say.
        space: what the features were of.
    """

    gaussian: Gaussian
    space: FeatureSpace


def save_statistics(features: FeatureSet, path: str | os.PathLike[str]) -> None:
    """Write a set's features, mean, covariance, file names and hashes, and metadata.

    pytorch-fid and clean-fid can read the file too (`mu`, `sigma`); we read everything.

    Args:
        features: the set.
        path: ends in `.npz`; appears only when complete.

    Raises:
        ValueError: `path` does not end in `.npz`, or the set has fewer than two images.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz, got {str(path)!r}.")
    require_features(features.features)
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
        assume_protocol: what a foreign file was made with; required for one, checked against ours.
        assume_extractor: the network of a foreign file.

    Raises:
        ValueError: the file does not exist, is damaged (`StorageError`), has none of the formats,
            or `assume_protocol` is missing, unknown or contradicted.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The statistics file {str(path)!r} does not exist.")
    arrays = read_arrays(path, _ARRAYS)
    if "metadata" in arrays:
        ours = _ours(path, arrays)
        if assume_protocol not in (None, ours.space.protocol):
            raise ValueError(
                f"{str(path)!r} was made with the protocol {ours.space.protocol}, which "
                f"contradicts `assume_protocol`, got {assume_protocol!r}."
            )
        return ours
    if assume_protocol is None:
        raise ValueError(
            f"{str(path)!r} does not say how its images were resized: name the protocol with "
            "`assume_protocol`, or make the file again from the images."
        )
    find_protocol(assume_protocol)
    space = FeatureSpace(assume_extractor, assume_protocol, assumed=True)
    if "feats" in arrays:
        features = _float_tensor(path, "feats", arrays["feats"]).to(torch.float32)
        require_features(features)
        return FeatureSet(features, (), (), space, from_cache=True)
    if "mu" in arrays and "sigma" in arrays:
        mean = _float_tensor(path, "mu", arrays["mu"])
        covariance = _float_tensor(path, "sigma", arrays["sigma"])
        return Statistics(Gaussian.from_statistics(mean, covariance), space)
    raise StorageError(
        f"{str(path)!r} must hold `mu` and `sigma`, or `feats`, "
        f"got {', '.join(sorted(arrays)) or 'none of them'}."
    )


def _ours(path: Path, arrays: dict[str, Array]) -> FeatureSet:
    try:
        metadata = json.loads(str(arrays["metadata"]))
        if metadata["format"] != _FORMAT:
            raise StorageError(f"{str(path)!r} has the unknown format {metadata['format']!r}.")
        features = _float_tensor(path, "features", arrays["features"])
        files = tuple(str(name) for name in arrays["files"])
        hashes = tuple(str(digest) for digest in arrays["hashes"])
        space = FeatureSpace(**metadata["space"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise StorageError(f"{str(path)!r} is not complete: {error}.") from error
    require_features(features)
    return FeatureSet(features, files, hashes, space, from_cache=True)


def _float_tensor(path: Path, name: str, array: Array) -> Tensor:
    if not np.issubdtype(array.dtype, np.floating):
        raise StorageError(f"`{name}` in {str(path)!r} must be floating point, got {array.dtype}.")
    return torch.from_numpy(np.ascontiguousarray(array))
