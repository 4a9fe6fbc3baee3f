"""The result of comparing image sets, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sd_tokenmerge.fid.image_change import PairedChange
from sd_tokenmerge.fid.jackknife import NUM_GROUPS
from sd_tokenmerge.fid.kid import SubsetKID
from sd_tokenmerge.fid.manifold import Manifold


@dataclass(frozen=True)
class Delta:
    """Difference from the unmerged baseline (generated minus baseline; positive is worse).

    Attributes:
        fid: difference of the Fréchet distances.
        fid_se: its standard error; paired, as the jackknife deletes the same images of both sets.
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
    """Distances of a set, with everything that determines whether two results are comparable.

    Attributes:
        fid: Fréchet distance in the extractor's features (an FID only with `inception`).
        fid_se: its standard error over the generated images; None for saved statistics without
            features, and for fewer than 40 images.
        kid: kernel distance over all pairs; None without features.
        kid_se: its standard error.
        kid_subsets: KID over random subsets, as other packages print it; None unless requested.
        num_reference: images in the reference; None if unknown (a foreign file).
        num_generated: images in the generated set; None if unknown.
        num_features: D.
        extractor: name of the network.
        protocol: name of the image preparation.
        precision: of the network's arithmetic.
        weights_sha256: of the network's weights; None if unknown.
        assumed: whether the user stated extractor and protocol, because the file does not.
        groups: description of the jackknife's groups; None without errors.
        delta: difference from the baseline; None without one.
        manifold: precision, recall, density, coverage; None unless requested.
        warnings: sentences on what affects the interpretation of the numbers.
        seconds: total wall time.
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


def format_comparison(result: Comparison, change: PairedChange | None = None) -> str:
    """A result as aligned lines of text."""
    name = "FID" if result.extractor == "inception" else "FD"
    rows = [
        (name, _with_error(result.fid, result.fid_se)),
        ("KID x 1000", _with_error(_thousand(result.kid), _thousand(result.kid_se))),
    ]
    if result.kid_subsets is not None:
        mean, std = (1000 * value for value in result.kid_subsets)
        rows.append(("KID x 1000, subsets", f"{mean:.3f}, SD of one {std:.3f}"))
    if result.delta is not None:
        delta = result.delta
        mark = {None: "", True: "  exceeds 2 SE", False: "  within 2 SE"}[delta.significant]
        rows += [
            (f"{name} - baseline", _with_error(delta.fid, delta.fid_se, sign="+") + mark),
            (
                "KID x 1000 - baseline",
                _with_error(_thousand(delta.kid), _thousand(delta.kid_se), sign="+"),
            ),
        ]
    if change is not None:
        rows += [
            ("PSNR to baseline", f"{change.psnr:.2f} dB, mean ({change.num_identical} identical)"),
            ("SSIM to baseline", f"{change.ssim:.4f}, mean"),
        ]
        if change.feature_distance is not None:
            rows.append(("features to baseline", f"{change.feature_distance:.4f}, mean"))
    if result.manifold is not None:
        rows += [
            ("precision, recall", f"{result.manifold.precision:.4f}, {result.manifold.recall:.4f}"),
            ("density, coverage", f"{result.manifold.density:.4f}, {result.manifold.coverage:.4f}"),
        ]
    counts = [
        "unknown" if count is None else count
        for count in (result.num_reference, result.num_generated)
    ]
    weights = (result.weights_sha256 or "unknown")[:8]
    rows += [
        ("images", f"{counts[0]} reference, {counts[1]} generated"),
        ("features", f"{result.num_features} of {result.extractor}, weights {weights}"),
        ("protocol", f"{result.protocol}, {result.precision}"),
    ]
    if result.groups is not None:
        rows.append(("standard errors", f"jackknife, {result.groups}"))
    elif result.num_generated is not None and result.num_generated < 2 * NUM_GROUPS:
        rows.append(("standard errors", f"none with fewer than {2 * NUM_GROUPS} images"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
