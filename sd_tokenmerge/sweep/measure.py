"""Measure the images of a setting: distance to the reference, change from unmerged images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from sd_tokenmerge.fid.comparison import Comparison
from sd_tokenmerge.fid.evaluate import Evaluator
from sd_tokenmerge.fid.extractors import find_extractor
from sd_tokenmerge.fid.features import FeatureSet, extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.fid.preprocess import find_protocol
from sd_tokenmerge.fid.sources import require_set, unfinished_run
from sd_tokenmerge.fid.storage import default_cache_folder
from sd_tokenmerge.report.rows import SweepRow
from sd_tokenmerge.sampling.manifest import ImageRecord, read_manifest
from sd_tokenmerge.sweep.change import cached_change
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.settings import Setting


class Measurer:
    """Measures run folders against one reference, computing shared parts once."""

    def __init__(
        self, options: SweepOptions, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Check the reference and the extractor without loading them.

        Args:
            options: of the sweep.
            progress: called with (images done, total) while features are extracted.

        Raises:
            ValueError: the reference or the extractor cannot be used.
        """
        self._options = options
        self._extraction: dict[str, Any] = options.features.extraction() | {
            "device": options.generation.device,
            "progress": progress,
        }
        self._unmerged: FeatureSet | None = None
        if options.reference is not None:
            _require_reference(options.reference)
            _require_extractor(options.features)

    def load_reference(self) -> None:
        """Extract the reference's features, or read them from the cache.

        Under `accelerate launch`, all processes must call this and `measure`: they share the
        extraction.

        Raises:
            ValueError: the reference cannot be used.
        """
        if self._options.reference is not None:
            self._evaluator  # noqa: B018

    def measure(
        self, setting: Setting, unmerged: Setting | None, *, is_first_process: bool = True
    ) -> SweepRow | None:
        """Measure the images of a finished run.

        Args:
            setting: the run.
            unmerged: the unmerged pipeline's run, measured before; None if `setting` is that.
            is_first_process: whether to compute the numbers from the features.

        Returns:
            The numbers; None in a process that is not the first.

        Raises:
            ValueError: an image cannot be used, or the folder holds other pictures.
        """
        folder = setting.folder
        features = None
        if self._options.reference is not None:
            features = extract_features(folder, **self._extraction)
            if unmerged is None:
                self._unmerged = features
        if not is_first_process:
            return None
        records = read_manifest(folder)
        _require_recorded(folder, records)
        numbers: dict[str, Any] = {}
        if features is not None:
            baseline = None if unmerged is None else self._unmerged
            numbers = _distance_numbers(self._evaluator.compare(features, baseline=baseline))
        if unmerged is not None:
            cache = self._options.features.cache
            base = default_cache_folder() if cache is None else Path(cache)
            numbers |= _change_numbers(*cached_change(unmerged.folder, folder, base))
            if features is not None and self._unmerged is not None:
                apart = (features.features - self._unmerged.features).double().norm(dim=1)
                numbers["feature_distance"] = median(apart.tolist())
        return SweepRow(
            method=setting.method,
            keep_rate=setting.keep_rate,
            label=setting.label,
            num_generated=len(records),
            seconds_per_image=median(record.seconds for record in records),
            **numbers,
        )

    @cached_property
    def _evaluator(self) -> Evaluator:
        assert self._options.reference is not None  # checked by the callers
        return Evaluator(
            self._options.reference,
            assume_protocol=self._options.features.assume_protocol,
            **self._extraction,
        )


def _require_reference(source: str) -> None:
    require_set("reference", source)
    if (state := unfinished_run(source)) is not None:
        raise ValueError(f"`reference` must be complete, got the run {source!r}: {state}.")


def _require_extractor(options: FeatureOptions) -> None:
    """Refuse an unknown protocol or extractor, or missing weights unless they can be fetched."""
    protocol = find_protocol(options.protocol)
    if not options.download_weights:
        find_extractor(
            options.extractor,
            protocol,
            options.weights,
            download=False,
            allow_unknown=options.allow_unknown_weights,
        )


def _require_recorded(folder: Path, records: Sequence[ImageRecord]) -> None:
    """Refuse pictures that are not part of the run: a distance would count them."""
    recorded = {record.file for record in records}
    pictures = {path.relative_to(folder).as_posix() for path in find_images(folder)}
    if recorded != pictures:
        name = min(recorded ^ pictures)
        raise ValueError(
            f"The pictures in {str(folder)!r} must be those of its run, got {name!r} "
            f"{'besides' if name in pictures else 'missing'}. Move other pictures elsewhere."
        )


def _distance_numbers(result: Comparison) -> dict[str, Any]:
    notes = list(result.warnings)
    if result.groups is not None:
        notes.append(f"Standard errors of distances: delete-group jackknife, {result.groups}.")
    delta = result.delta
    return {
        "extractor": result.extractor,
        "protocol": result.protocol,
        "num_reference": result.num_reference,
        "fid": result.fid,
        "fid_se": result.fid_se,
        "delta": None if delta is None else delta.fid,
        "delta_se": None if delta is None else delta.fid_se,
        "kid": result.kid,
        "kid_se": result.kid_se,
        "notes": tuple(notes),
    }


def _change_numbers(psnr: Sequence[float], ssim: Sequence[float]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name, values in (("psnr_db", psnr), ("ssim", ssim)):
        numbers[name] = median(values)
        numbers[f"{name}_low"] = _percentile(values, 0.2)
        numbers[f"{name}_high"] = _percentile(values, 0.8)
    return numbers


def _percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest value: interpolating between infinite ones (identical images) gives NaN."""
    return sorted(values)[round(fraction * (len(values) - 1))]
