"""Compare image sets: distance to a reference, its error, and difference from a baseline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from sd_tokenmerge.fid.comparison import Comparison, Delta
from sd_tokenmerge.fid.distance import frechet_distance, rank_warning
from sd_tokenmerge.fid.features import FeatureSet
from sd_tokenmerge.fid.jackknife import (
    Groups,
    frechet_replicates,
    jackknife_error,
    make_groups,
)
from sd_tokenmerge.fid.kid import (
    SubsetKID,
    kernel_distance,
    kernel_replicates,
    self_similarity,
    subset_kid,
)
from sd_tokenmerge.fid.manifold import K_DENSITY, Manifold, compare_manifolds
from sd_tokenmerge.fid.sources import ExtractionOptions, Source, load_set
from sd_tokenmerge.fid.statistics import Statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Distances of one set to the reference, and the jackknife's replicates of them."""

    num_images: int | None
    files: tuple[str, ...]
    groups: Groups | None
    fid: float
    kid: float | None
    fid_replicates: Tensor | None
    kid_replicates: Tensor | None


class Evaluator:
    """Compares many sets with one reference and one baseline, computing shared parts once."""

    def __init__(
        self,
        reference: Source,
        *,
        standard_error: bool = True,
        kid: bool = True,
        kid_subset_size: int | None = None,
        manifold: bool = False,
        assume_protocol: str | None = None,
        **extraction: Unpack[ExtractionOptions],
    ) -> None:
        """Load the reference set and check that distances to it can be computed.

        Args:
            reference: folder of images, `.npz` file, `FeatureSet` or `Statistics`.
            standard_error: compute errors, from 40 distances per set with some images deleted.
            kid: compute the kernel distance.
            kid_subset_size: also average it over 100 random subsets of this size, as torchmetrics
                and torch-fidelity do (theirs is 1,000).
            manifold: compute precision, recall, density and coverage.
            assume_protocol: how the images of a foreign `.npz` file were prepared.
            extraction: options of `extract_features`.

        Raises:
            ValueError: as `load_set`, or the reference has fewer than two images or lacks the
                features that an option needs.
        """
        self._standard_error = standard_error
        self._kid = kid
        self._kid_subset_size = kid_subset_size
        self._manifold = manifold
        self._assume_protocol = assume_protocol
        self._extraction = extraction
        self._reference = self._load(reference)
        if self._reference.num_images == 1:
            raise ValueError(
                "`reference` must hold at least 2 images, got 1: one image has no covariance."
            )
        self._measured: dict[object, _Measured] = {}

    def compare(
        self, generated: Source, *, baseline: Source | None = None, force: bool = False
    ) -> Comparison:
        """Measure the distance of one set to the reference.

        Args:
            generated: folder of images, `.npz` file, `FeatureSet` or `Statistics`.
            baseline: the unmerged set with the same file names, for `Comparison.delta`.
            force: compare with a baseline of another size or with other names; the difference is
                then biased and has no paired error.

        Raises:
            ValueError: a set cannot be used, features are not comparable, or the baseline has other
                images (without `force`).
        """
        started = time.perf_counter()
        target = self._load(generated)
        kid_subsets = self._compare_subsets(target)
        manifold = self._compare_manifolds(target)
        measured = self._measure(target)
        warnings = _warnings("reference", self._reference) + _warnings("generated", target)
        delta = None
        if baseline is not None:
            unmerged = self._measure(self._load(baseline))
            delta = self._difference(measured, unmerged, force)
            if delta.num_baseline != measured.num_images:
                warnings.append(
                    f"baseline: {delta.num_baseline} images against {measured.num_images}; the "
                    "difference is biased."
                )
        space, known = target.space, self._reference.space
        return Comparison(
            fid=measured.fid,
            fid_se=_error(measured.fid, measured.fid_replicates, measured.groups),
            kid=measured.kid,
            kid_se=_error(measured.kid, measured.kid_replicates, measured.groups),
            kid_subsets=kid_subsets,
            num_reference=self._reference.num_images,
            num_generated=measured.num_images,
            num_features=self._reference.gaussian.num_features,
            extractor=space.extractor,
            protocol=space.protocol,
            precision=space.precision,
            weights_sha256=space.weights_sha256 or known.weights_sha256,
            assumed=space.assumed or known.assumed,
            groups=None if measured.fid_replicates is None else str(measured.groups),
            delta=delta,
            manifold=manifold,
            warnings=tuple(warnings),
            seconds=time.perf_counter() - started,
        )

    def _load(self, source: Source) -> FeatureSet | Statistics:
        return load_set(source, assume_protocol=self._assume_protocol, **self._extraction)

    @cached_property
    def _reference_similarity(self) -> float:
        assert isinstance(self._reference, FeatureSet)  # checked by the caller
        return self_similarity(self._reference.features)

    def _measure(self, target: FeatureSet | Statistics) -> _Measured:
        self._reference.space.require_same(target.space)
        if not isinstance(target, FeatureSet) or not target.hashes:
            return self._measure_anew(target)
        key = (target.files, target.hashes)
        if key not in self._measured:
            self._measured[key] = self._measure_anew(target)
        return self._measured[key]

    def _measure_anew(self, target: FeatureSet | Statistics) -> _Measured:
        reference = self._reference
        fid = frechet_distance(reference.gaussian, target.gaussian)
        if not isinstance(target, FeatureSet):
            return _Measured(target.num_images, (), None, fid, None, None, None)
        kid, fid_replicates, kid_replicates = None, None, None
        groups = make_groups(target.files) if self._standard_error else None
        if groups is not None:
            fid_replicates = frechet_replicates(target.features, reference.gaussian, groups)
        if self._kid and isinstance(reference, FeatureSet):
            pair = target.features, reference.features
            similarity = self._reference_similarity
            kid = kernel_distance(*pair, reference_similarity=similarity)
            if groups is not None:
                kid_replicates = kernel_replicates(*pair, groups, reference_similarity=similarity)
        return _Measured(
            target.num_images, target.files, groups, fid, kid, fid_replicates, kid_replicates
        )

    def _difference(self, measured: _Measured, baseline: _Measured, force: bool) -> Delta:
        if measured.num_images != baseline.num_images and not force:
            raise ValueError(
                f"`baseline` must have as many images as the generated set, got "
                f"{baseline.num_images} and {measured.num_images}: the distance falls with the "
                "number of images, so the difference would mean nothing. "
                "(`force` compares them anyway.)"
            )
        paired = measured.files == baseline.files
        if not paired and not force:
            raise ValueError(
                "`baseline` must have the same file names as the generated set, for pairs of "
                "the same prompt and seed. (`force` compares them anyway, without an error.)"
            )
        fid = measured.fid - baseline.fid
        kid = _difference(measured.kid, baseline.kid)
        groups = measured.groups if paired else None
        fid_replicates = _difference(measured.fid_replicates, baseline.fid_replicates)
        kid_replicates = _difference(measured.kid_replicates, baseline.kid_replicates)
        return Delta(
            fid=fid,
            fid_se=_error(fid, fid_replicates, groups),
            kid=kid,
            kid_se=_error(kid, kid_replicates, groups),
            num_baseline=baseline.num_images,
        )

    def _compare_subsets(self, target: FeatureSet | Statistics) -> SubsetKID | None:
        size = self._kid_subset_size
        if size is None:
            return None
        features, reference = self._both_features(target, "kid_subset_size")
        smaller = min(len(features), len(reference))
        if not 2 <= size <= smaller:
            raise ValueError(f"`kid_subset_size` must be in [2, {smaller}], got {size}.")
        return subset_kid(features, reference, subset_size=size)

    def _compare_manifolds(self, target: FeatureSet | Statistics) -> Manifold | None:
        if not self._manifold:
            return None
        features, reference = self._both_features(target, "manifold")
        smaller = min(len(features), len(reference))
        if smaller <= K_DENSITY:
            raise ValueError(
                f"`manifold` needs at least {K_DENSITY + 1} images in each set, got {smaller}."
            )
        return compare_manifolds(features, reference)

    def _both_features(self, target: FeatureSet | Statistics, option: str) -> tuple[Tensor, Tensor]:
        self._reference.space.require_same(target.space)
        if isinstance(target, Statistics) or isinstance(self._reference, Statistics):
            raise ValueError(f"`{option}` needs features, got statistics without them.")
        return target.features, self._reference.features


def compare(
    reference: Source,
    generated: Source,
    *,
    baseline: Source | None = None,
    standard_error: bool = True,
    kid: bool = True,
    kid_subset_size: int | None = None,
    manifold: bool = False,
    assume_protocol: str | None = None,
    force: bool = False,
    **extraction: Unpack[ExtractionOptions],
) -> Comparison:
    """Measure the distance of a generated set to a reference set.

    For several sets and one reference, `Evaluator` computes the shared parts once; arguments and
    errors are documented there.
    """
    evaluator = Evaluator(
        reference,
        standard_error=standard_error,
        kid=kid,
        kid_subset_size=kid_subset_size,
        manifold=manifold,
        assume_protocol=assume_protocol,
        **extraction,
    )
    return evaluator.compare(generated, baseline=baseline, force=force)


def _difference(a: _Number | None, b: _Number | None) -> _Number | None:
    return None if a is None or b is None else a - b


def _error(value: float | None, replicates: Tensor | None, groups: Groups | None) -> float | None:
    if value is None or replicates is None or groups is None:
        return None
    return jackknife_error(value, replicates, groups)


def _warnings(name: str, source: FeatureSet | Statistics) -> list[str]:
    """Warnings about a set."""
    messages = [rank_warning(source.gaussian)]
    if isinstance(source, FeatureSet) and (pairs := source.duplicates):
        messages.append(
            f"{len(pairs)} of {source.num_images} images have the same bytes as another "
            f"(the first pair is {pairs[0][0]!r} and {pairs[0][1]!r})"
        )
    if source.space.assumed:
        messages.append("extractor and protocol are assumed: the file does not record them")
    return [f"{name}: {message}." for message in messages if message is not None]
