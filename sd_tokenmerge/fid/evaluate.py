"""From image sets to numbers that can be published: distance, its error, change to a baseline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import Gaussian, rank_warning, squared_wasserstein
from sd_tokenmerge.fid.features import FeatureSet, extract_features
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
from sd_tokenmerge.fid.statistics import Statistics, load_statistics

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


@dataclass(frozen=True)
class Delta:
    """Difference to the unmerged baseline (generated minus baseline; positive is worse).

    Attributes:
        fid: difference of the Fréchet distances.
        fid_se: its standard error, paired: both sets lose the same images at a time.
        kid: difference of the KIDs.
        kid_se: its standard error, paired.
        num_baseline: images in the baseline.
    """

    fid: float
    fid_se: float | None
    kid: float | None
    kid_se: float | None
    num_baseline: int | None

    @property
    def significant(self) -> bool | None:
        """Whether `fid` exceeds two standard errors; None without an error."""
        return None if self.fid_se is None else abs(self.fid) > 2 * self.fid_se


@dataclass(frozen=True)
class Comparison:
    """The result, with everything that another number must share to be comparable.

    Attributes:
        fid: Fréchet distance in the extractor's features (an FID only with `inception`).
        fid_se: its standard error over the generated images; None for saved statistics without
            features, and for fewer than 40 images.
        kid: kernel distance, all pairs; None without features.
        kid_se: its standard error.
        kid_subsets: KID over random subsets as other packages print it, where asked for.
        num_reference: images in the reference; None where a foreign file does not say.
        num_generated: images in the generated set; None likewise.
        num_features: D.
        extractor: name of the network.
        protocol: name of the image preparation.
        precision: of the network's arithmetic.
        weights_sha256: of the network's weights; None where a foreign file does not say.
        assumed: whether extractor and protocol are the user's word.
        groups: what the errors' jackknife deleted at a time; None without errors.
        delta: difference to the baseline, where one was given.
        manifold: precision, recall, density, coverage, where asked for.
        warnings: what a reader of the number should know.
        seconds: time taken in all.
    """

    fid: float
    fid_se: float | None
    kid: float | None
    kid_se: float | None
    kid_subsets: SubsetKID | None
    num_reference: int | None
    num_generated: int | None
    num_features: int
    extractor: str
    protocol: str
    precision: str
    weights_sha256: str | None
    assumed: bool
    groups: str | None
    delta: Delta | None
    manifold: Manifold | None
    warnings: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = asdict(self)
        if self.kid_subsets is not None:
            values["kid_subsets"] = self.kid_subsets._asdict()
        if self.delta is not None:
            values["delta"]["significant"] = self.delta.significant
        return values


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
            fid_se=_error(measured.fid_replicates),
            kid=measured.kid,
            kid_se=_error(measured.kid_replicates),
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
                "(--force compares nevertheless.)"
            )
        paired = measured.files == baseline.files
        if not paired and not force:
            raise ValueError(
                "`baseline` must have the same file names as the generated set, for pairs of "
                "the same prompt and seed. (--force compares nevertheless, without an error.)"
            )
        kid = None
        if measured.kid is not None and baseline.kid is not None:
            kid = measured.kid - baseline.kid
        return Delta(
            fid=measured.fid - baseline.fid,
            fid_se=_paired_error(measured.fid_replicates, baseline.fid_replicates, paired),
            kid=kid,
            kid_se=_paired_error(measured.kid_replicates, baseline.kid_replicates, paired),
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


def load_set(
    source: Source,
    *,
    assume_protocol: str | None = None,
    **extraction: Unpack[ExtractionOptions],
) -> FeatureSet | Statistics:
    """Features or statistics of a folder, an `.npz` file, or something loaded already.

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


def _error(replicates: Tensor | None) -> float | None:
    return None if replicates is None else jackknife_error(replicates)


def _paired_error(a: Tensor | None, b: Tensor | None, paired: bool) -> float | None:
    return jackknife_error(a - b) if paired and a is not None and b is not None else None
