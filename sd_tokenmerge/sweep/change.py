"""PSNR and SSIM between two runs, cached by content as features are.

A sweep measures all its settings at every start, and comparing every pair of images takes long.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.fid.storage import StorageError, read_arrays, write_arrays
from sd_tokenmerge.sampling.manifest import read_manifest

_FORMAT = 1


def cached_change(unmerged: Path, folder: Path, cache: Path) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM of each image of a run to the unmerged image of the same name.

    Args:
        unmerged: run folder of the unmerged images.
        folder: run folder of the images to compare.
        cache: folder of cached results.

    Raises:
        ValueError: as `paired_change`.
    """
    records = [[(r.file, r.sha256) for r in read_manifest(one)] for one in (unmerged, folder)]
    key = hashlib.sha256(json.dumps([_FORMAT, records]).encode()).hexdigest()
    path = cache / "change" / f"{key}.npz"
    with suppress(StorageError):
        arrays = read_arrays(path, ("psnr", "ssim"))
        values = [arrays[name] for name in ("psnr", "ssim") if name in arrays]
        shape = (len(records[1]),)
        if len(values) == 2 and all(v.shape == shape and not np.isnan(v).any() for v in values):
            return values[0].tolist(), values[1].tolist()
    images = paired_change(unmerged, folder).images
    psnr, ssim = [image.psnr for image in images], [image.ssim for image in images]
    with suppress(OSError):  # a cache that cannot be written costs time, no results
        write_arrays(path, {"psnr": np.array(psnr), "ssim": np.array(ssim)})
    return psnr, ssim
