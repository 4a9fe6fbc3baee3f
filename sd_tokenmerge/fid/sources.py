"""Load an image set from a folder or an `.npz` file, unless it is already loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from sd_tokenmerge.fid.features import FeatureSet, extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.statistics import Statistics, load_statistics
from sd_tokenmerge.sampling.description import RUN_FILE, DescriptionError
from sd_tokenmerge.sampling.status import find_runs, run_status

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


def require_set(name: str, source: str | os.PathLike[str]) -> None:
    """Refuse what cannot be a set of images, before anything is loaded.

    A folder of several runs is none, such as a sweep's folder with its plots.

    Args:
        name: what messages call the source, such as an argument's name.
        source: folder of images or `.npz` file.

    Raises:
        ValueError: the source does not exist, or is a folder without images or of several runs.
    """
    path = Path(source)
    if not os.fspath(source) or not path.exists():  # an empty text would be the current folder
        raise ValueError(
            f"`{name}` must be a folder of images or an .npz file, got {os.fspath(source)!r}, "
            f"which does not exist."
        )
    if path.suffix == ".npz" and not path.is_dir():
        return
    others = [run for run in find_runs(path) if run != path] if path.is_dir() else []
    if others:
        raise ValueError(
            f"`{name}` must be one set of images, got {str(path)!r} with runs in it: give the "
            f"folder of one of them, such as {str(others[0])!r}."
        )
    find_images(path, name=name)


def unfinished_run(source: str | os.PathLike[str]) -> str | None:
    """How far the run in a folder is, such as "3 of 4 images are done"; None if it is complete.

    Also None for a file, and for a folder without a run that can be read.

    Raises:
        OSError: a file of the run cannot be read.
    """
    folder = Path(source)
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        status = run_status(folder, hash_all=False)
    except DescriptionError:  # or another program's run.json
        return None
    if status.is_complete:
        return None
    return "; ".join([f"{status.done} of {status.total} images are done", *status.findings])
