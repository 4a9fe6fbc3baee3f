"""Load an image set from a folder or an `.npz` file, unless it is already loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from sd_tokenmerge.fid.features import FeatureSet, extract_features
from sd_tokenmerge.fid.statistics import Statistics, load_statistics
from sd_tokenmerge.sampling.status import find_runs

if TYPE_CHECKING:
    from typing_extensions import Unpack

Source = str | os.PathLike[str] | FeatureSet | Statistics


class ExtractionOptions(TypedDict, total=False):
    """Options of `extract_features`, where they are documented."""

    extractor: str
    protocol: str
    weights: str | os.PathLike[str] | None
    download_weights: bool
    allow_unknown_weights: bool
    precision: str
    batch_size: int
    num_workers: int | None
    device: str | torch.device | None
    cache: str | os.PathLike[str] | bool
    progress: Callable[[int, int], None] | None


def load_set(
    source: Source,
    *,
    assume_protocol: str | None = None,
    **extraction: Unpack[ExtractionOptions],
) -> FeatureSet | Statistics:
    """Features or statistics of a folder, of an `.npz` file, or as already loaded.

    Raises:
        ValueError: the source does not exist, or as `extract_features` and `load_statistics`.
    """
    if isinstance(source, FeatureSet | Statistics):
        return source
    path = Path(source)
    if path.suffix == ".npz" and not path.is_dir():
        return load_statistics(
            path,
            assume_protocol=assume_protocol,
            assume_extractor=extraction.get("extractor", "inception"),
        )
    return extract_features(path, **extraction)


def require_one_set(name: str, folder: Path) -> None:
    """Refuse a folder of several runs, or a sweep's folder with its plots, as one set of images.

    Args:
        name: what the message calls the folder, such as an argument's name.
        folder: may also be a file.

    Raises:
        ValueError: there are runs below the folder.
    """
    others = [run for run in find_runs(folder) if run != folder] if folder.is_dir() else []
    if others:
        raise ValueError(
            f"`{name}` must be one set of images, got {str(folder)!r} with runs in it: give the "
            f"folder of one of them, such as {str(others[0])!r}."
        )
