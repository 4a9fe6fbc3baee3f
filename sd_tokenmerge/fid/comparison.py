"""The result of comparing image sets."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sd_tokenmerge.fid.kid import SubsetKID
from sd_tokenmerge.fid.manifold import Manifold


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
