"""Measure the images of one setting: distance to the reference, and change to the unmerged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from sd_tokenmerge.fid.comparison import Comparison
from sd_tokenmerge.fid.evaluate import Evaluator
from sd_tokenmerge.fid.extractors import find_extractor
from sd_tokenmerge.fid.features import FeatureSet, extract_features, list_content
from sd_tokenmerge.fid.image_change import PairedChange, paired_change
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.preprocess import find_protocol
from sd_tokenmerge.fid.sources import ExtractionOptions, load_set
from sd_tokenmerge.fid.statistics import Statistics
from sd_tokenmerge.files import file_sha256
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.plan import SweepPlan
from sd_tokenmerge.sweep.state import Measurement, SweepState, content_key

MEASUREMENT = 2
"""Version of what `Measurer.measure` computes: a new one measures everything again."""

ExtractionProgress = Callable[[int, int], None]


class Measurer:
    """Measures run folders against one reference, computing shared parts once."""

    def __init__(self, options: SweepOptions, progress: ExtractionProgress | None = None) -> None:
        """Look at the reference and the extractor's weights, without loading them.

        Args:
            options: of the sweep.
            progress: called with (images done, images in all) while features are extracted.

        Raises:
            ValueError: the reference or the extractor cannot be used.
        """
        self._options = options
        self._extraction = ExtractionOptions(
            extractor=options.extractor,
            protocol=options.protocol,
            weights=options.weights,
            download_weights=options.download_weights,
            allow_unknown_weights=options.allow_unknown_weights,
            precision=options.precision,
            device=options.generation.device,
            cache=True if options.cache is None else options.cache,
            progress=progress,
        )
        self._reference_content = _describe_reference(options)
        self._baseline: tuple[Path, FeatureSet] | None = None

    def key(self, folder: Path, baseline: Path | None) -> str:
        """A hash over everything a measurement depends on: images, reference, extractor.

        Raises:
            ValueError: there are pictures in a folder that are no part of its run.
        """
        sets = [None if path is None else run_content(path) for path in (folder, baseline)]
        return content_key([MEASUREMENT, self._reference_content, sets])

    def measure(
        self, folder: Path, baseline: Path | None, *, is_first_process: bool = True
    ) -> Measurement | None:
        """Measure the images of a finished run.

        Under `accelerate launch`, all processes must call this: they share the extraction.

        Args:
            folder: the run folder.
            baseline: that of the unmerged pipeline; None if this is it.
            is_first_process: whether to compute the numbers once the features are there.

        Returns:
            The numbers; None in a process that is not the first.

        Raises:
            ValueError: an image cannot be used.
        """
        features, unmerged = None, None
        if self._options.reference is not None:
            self._reference  # noqa: B018  all processes extract it, the first one uses it
            if baseline is not None:
                unmerged = self._baseline_features(baseline)
                features = extract_features(folder, **self._extraction)
            else:
                features = self._baseline_features(folder)
        if not is_first_process:
            return None
        numbers: dict[str, Any] = {"num_generated": len(run_content(folder))}
        if features is not None:
            numbers |= _distance_numbers(self._evaluator.compare(features, baseline=unmerged))
        if baseline is not None:
            pair = None if features is None or unmerged is None else (unmerged, features)
            numbers |= _change_numbers(paired_change(baseline, folder, features=pair))
        return Measurement(**numbers)

    @cached_property
    def _reference(self) -> FeatureSet | Statistics:
        assert self._options.reference is not None  # the caller's business
        return load_set(
            self._options.reference,
            assume_protocol=self._options.assume_protocol,
            **self._extraction,
        )

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self._reference, **self._extraction)

    def _baseline_features(self, folder: Path) -> FeatureSet:
        if self._baseline is None or self._baseline[0] != folder:
            self._baseline = folder, extract_features(folder, **self._extraction)
        return self._baseline[1]


def measured_settings(options: SweepOptions, plan: SweepPlan) -> list[bool]:
    """Which settings of a plan are measured already, from the content that is there now.

    Looks at the reference and the extractor's weights too, but downloads nothing.

    Raises:
        ValueError: the reference or the extractor cannot be used.
    """
    if options.download_weights:
        return [False for _ in plan.runs]  # whether they are missing shows when they are fetched
    measurer = Measurer(options)
    state = SweepState.read(Path(options.out))
    baseline = plan.runs[0]
    found = []
    for run in plan.runs:
        folder = run.setting.folder
        is_complete = not (run.num_missing or baseline.num_missing)
        unmerged = None if run is baseline else baseline.setting.folder
        found.append(
            is_complete
            and state.measurement(folder.name, measurer.key(folder, unmerged)) is not None
        )
    return found


def run_content(folder: Path) -> dict[str, str]:
    """File names and hashes of a finished run's images, from its manifest.

    Raises:
        ValueError: there are other pictures in the folder, which a distance would count.
    """
    content = {record.file: record.sha256 for record in read_manifest(folder)}
    present = {path.relative_to(folder).as_posix() for path in find_images(folder)}
    if present != content.keys():
        name = min(present ^ content.keys())
        raise ValueError(
            f"The pictures in {str(folder)!r} must be those of its run, got {name!r} "
            f"{'besides' if name in present else 'missing'}. Move other pictures elsewhere."
        )
    return content


def _describe_reference(options: SweepOptions) -> Any:
    """What the distances depend on besides the images."""
    if options.reference is None:
        return None
    path = Path(options.reference)
    if not path.exists():
        raise ValueError(
            f"`reference` must be a folder of images or an .npz file, got {options.reference!r}, "
            f"which does not exist."
        )
    is_file = path.suffix == ".npz" and path.is_file()
    content: Any = file_sha256(path) if is_file else list_content(path)[1]
    extractor = find_extractor(
        options.extractor,
        find_protocol(options.protocol),
        options.weights,
        download=options.download_weights,
        allow_unknown=options.allow_unknown_weights,
    )
    space = [extractor.name, options.protocol, options.precision, extractor.weights_sha256]
    return [space, content, options.assume_protocol]


def _distance_numbers(result: Comparison) -> dict[str, Any]:
    notes = list(result.warnings)
    if result.groups is not None:
        notes.append(f"Standard errors of distances: delete-group jackknife, {result.groups}.")
    delta = result.delta
    return {
        "num_reference": result.num_reference,
        "fid": result.fid,
        "fid_se": result.fid_se,
        "delta": None if delta is None else delta.fid,
        "delta_se": None if delta is None else delta.fid_se,
        "kid": result.kid,
        "kid_se": result.kid_se,
        "notes": tuple(notes),
    }


def _change_numbers(change: PairedChange) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name, values in (
        ("psnr_db", [image.psnr for image in change.images]),
        ("ssim", [image.ssim for image in change.images]),
    ):
        numbers[name] = median(values)
        numbers[f"{name}_low"] = _percentile(values, 0.2)
        numbers[f"{name}_high"] = _percentile(values, 0.8)
    distances = [image.feature_distance for image in change.images]
    known = [distance for distance in distances if distance is not None]
    return numbers | {"feature_distance": median(known) if known else None}


def _percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest value: interpolation between infinite ones (equal pictures) would be NaN."""
    return sorted(values)[round(fraction * (len(values) - 1))]
