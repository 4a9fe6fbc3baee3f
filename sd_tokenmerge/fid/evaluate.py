"""From image sets to numbers that can be published: distance, its error, change to a baseline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from sd_tokenmerge.fid.comparison import Comparison, Delta
from sd_tokenmerge.fid.distance import Gaussian, rank_warning, squared_wasserstein
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
from sd_tokenmerge.fid.manifold import Manifold, compare_manifolds
from sd_tokenmerge.fid.sources import ExtractionOptions, Source, load_set
from sd_tokenmerge.fid.statistics import Statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Comparison",
    "Delta",
    "Evaluator",
    "ExtractionOptions",
    "Source",
    "compare",
    "load_set",
]


_Number = TypeVar("_Number", float, Tensor)


@dataclass(eq=False)
class _Prepared:
    """A set and what was already computed from it."""

    source: FeatureSet | Statistics

    @cached_property
    def gaussian(self) -> Gaussian:
        if isinstance(self.source, Statistics):
            return self.source.gaussian
        return Gaussian.from_features(self.source.features)

    @cached_property
    def similarity(self) -> float:
        assert isinstance(self.source, FeatureSet)  # the callers' business
        return self_similarity(self.source.features)

    @property
    def features(self) -> Tensor | None:
        return self.source.features if isinstance(self.source, FeatureSet) else None

    @property
    def files(self) -> tuple[str, ...]:
        return self.source.files if isinstance(self.source, FeatureSet) else ()

    def warnings(self, name: str) -> list[str]:
        """What a reader should know about this set."""
        messages = [rank_warning(self.gaussian)]
        if isinstance(self.source, FeatureSet) and (pairs := self.source.duplicates):
            messages.append(
                f"{len(pairs)} of {self.source.num_images} images have the bytes of another one "
                f"(the first pair is {pairs[0][0]!r} and {pairs[0][1]!r})"
            )
        if self.source.space.assumed:
            messages.append("extractor and protocol are assumed, the file does not say")
        return [f"{name}: {message}." for message in messages if message is not None]


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
        """Load the reference set.

        Args:
            reference: folder of images, `.npz` file, `FeatureSet` or `Statistics`.
            standard_error: compute errors (20 distances per set: seconds for thousands of images).
            kid: compute the kernel distance.
            kid_subset_size: also average it over 100 random subsets of this size, as torchmetrics
                and torch-fidelity do (theirs is 1,000).
            manifold: compute precision, recall, density and coverage.
            assume_protocol: how the images of a foreign `.npz` file were prepared.
            extraction: options of `extract_features`.

        Raises:
            ValueError: as `load_set`.
        """
        self._standard_error = standard_error
        self._kid = kid
        self._kid_subset_size = kid_subset_size
        self._manifold = manifold
        self._assume_protocol = assume_protocol
        self._extraction = extraction
        self._reference = _Prepared(self._load(reference))
        self._measured: dict[object, _Measured] = {}

    def compare(
        self, generated: Source, *, baseline: Source | None = None, force: bool = False
    ) -> Comparison:
        """Measure the distance of one set to the reference.

        Args:
            generated: folder of images, `.npz` file, `FeatureSet` or `Statistics`.
            baseline: the unmerged set of the same file names, for `Comparison.delta`.
            force: compare with a baseline of other size or names; the difference is then biased,
                and has no paired error.

        Raises:
            ValueError: a set cannot be used, features are not comparable, or the baseline has other
                images (without `force`).
        """
        started = time.perf_counter()
        target = _Prepared(self._load(generated))
        measured = self._measure(target)
        warnings = self._reference.warnings("reference") + target.warnings("generated")
        delta = None
        if baseline is not None:
            unmerged = self._measure(_Prepared(self._load(baseline)))
            delta = self._difference(measured, unmerged, force)
            if delta.num_baseline != measured.num_images:
                warnings.append(
                    f"baseline: {delta.num_baseline} images against {measured.num_images}; the "
                    "difference is biased."
                )
        space, known = target.source.space, self._reference.source.space
        return Comparison(
            fid=measured.fid,
            fid_se=_error(measured.fid, measured.fid_replicates, measured.groups),
            kid=measured.kid,
            kid_se=_error(measured.kid, measured.kid_replicates, measured.groups),
            kid_subsets=self._compare_subsets(target),
            num_reference=self._reference.gaussian.num_images,
            num_generated=measured.num_images,
            num_features=self._reference.gaussian.num_features,
            extractor=space.extractor,
            protocol=space.protocol,
            precision=space.precision,
            weights_sha256=space.weights_sha256 or known.weights_sha256,
            assumed=space.assumed or known.assumed,
            groups=None if measured.fid_replicates is None else str(measured.groups),
            delta=delta,
            manifold=self._compare_manifolds(target),
            warnings=tuple(warnings),
            seconds=time.perf_counter() - started,
        )

    def _load(self, source: Source) -> FeatureSet | Statistics:
        return load_set(source, assume_protocol=self._assume_protocol, **self._extraction)

    def _measure(self, target: _Prepared) -> _Measured:
        self._reference.source.space.require_same(target.source.space)
        if not isinstance(target.source, FeatureSet) or not target.source.hashes:
            return self._measure_anew(target)
        key = (target.source.files, target.source.hashes)
        if key not in self._measured:
            self._measured[key] = self._measure_anew(target)
        return self._measured[key]

    def _measure_anew(self, target: _Prepared) -> _Measured:
        reference = self._reference
        fid = squared_wasserstein(reference.gaussian, target.gaussian)
        kid, fid_replicates, kid_replicates = None, None, None
        groups = make_groups(target.files) if self._standard_error else None
        if target.features is not None and groups is not None:
            fid_replicates = frechet_replicates(target.features, reference.gaussian, groups)
        if self._kid and target.features is not None and reference.features is not None:
            similarity = reference.similarity
            kid = kernel_distance(
                target.features, reference.features, reference_similarity=similarity
            )
            if groups is not None:
                kid_replicates = kernel_replicates(
                    target.features, reference.features, groups, reference_similarity=similarity
                )
        count = target.gaussian.num_images
        return _Measured(count, target.files, groups, fid, kid, fid_replicates, kid_replicates)

    def _difference(self, measured: _Measured, baseline: _Measured, force: bool) -> Delta:
        if measured.num_images != baseline.num_images and not force:
            raise ValueError(
                f"`baseline` must have as many images as the generated set, got "
                f"{baseline.num_images} and {measured.num_images}: the distance falls with the "
                "number of images, so the difference would mean nothing. "
                "(`force` compares nevertheless.)"
            )
        paired = measured.files == baseline.files
        if not paired and not force:
            raise ValueError(
                "`baseline` must have the same file names as the generated set, for pairs of "
                "the same prompt and seed. (`force` compares nevertheless, without an error.)"
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

    def _compare_subsets(self, target: _Prepared) -> SubsetKID | None:
        if self._kid_subset_size is None:
            return None
        if target.features is None or self._reference.features is None:
            raise ValueError("`kid_subset_size` needs features, got statistics without them.")
        return subset_kid(
            target.features, self._reference.features, subset_size=self._kid_subset_size
        )

    def _compare_manifolds(self, target: _Prepared) -> Manifold | None:
        if not self._manifold:
            return None
        if target.features is None or self._reference.features is None:
            raise ValueError("`manifold` needs features, got statistics without them.")
        return compare_manifolds(target.features, self._reference.features)


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
