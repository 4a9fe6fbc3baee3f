"""The rows of all tables and plots: one setting with its measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sd_tokenmerge.sampling.options import NO_METHOD


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One method at one keep rate. Quantities that were not measured are None.

    Attributes:
        method: method string; `NO_METHOD` for the unmerged pipeline.
        keep_rate: fraction of the tokens that is kept, in (0, 1]; 1 for the unmerged pipeline.
        label: the method's name in tables and plots.
        source: `"measured"` here, or `"published"` elsewhere (see `report.published`).
        extractor: feature network of `fid` and `kid`.
        protocol: preprocessing of `fid` and `kid`.
        num_generated: number of generated images.
        num_reference: number of reference images.
        fid: Fréchet distance to the reference set. It is an FID only if `extractor` is
            `"inception"`.
        fid_se: standard error of `fid` over the generated images, with the reference set fixed.
        delta: `fid` minus the `fid` of the unmerged pipeline.
        delta_se: standard error of `delta`, paired by seed and therefore much smaller than
            `fid_se`.
        kid: unbiased kernel distance (MMD²) to the reference set.
        kid_se: standard error of `kid`.
        psnr_db: peak signal-to-noise ratio to the unmerged image of the same seed in dB: median
            over the images; infinite for identical images.
        psnr_db_low: 20th percentile of the same.
        psnr_db_high: 80th percentile of the same.
        ssim: structural similarity to the unmerged image of the same seed, in [-1, 1]: median.
        ssim_low: 20th percentile of the same.
        ssim_high: 80th percentile of the same.
        feature_distance: Euclidean distance in the extractor's features to the unmerged image of
            the same seed: median.
        seconds_per_image: median time to generate one image.
        notes: sentences that qualify the numbers.
    """

    method: str
    keep_rate: float
    label: str
    source: Literal["measured", "published"] = "measured"
    extractor: str | None = None
    protocol: str | None = None
    num_generated: int | None = None
    num_reference: int | None = None
    fid: float | None = None
    fid_se: float | None = None
    delta: float | None = None
    delta_se: float | None = None
    kid: float | None = None
    kid_se: float | None = None
    psnr_db: float | None = None
    psnr_db_low: float | None = None
    psnr_db_high: float | None = None
    ssim: float | None = None
    ssim_low: float | None = None
    ssim_high: float | None = None
    feature_distance: float | None = None
    seconds_per_image: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unmerged pipeline."""
        return self.method == NO_METHOD

    @property
    def is_significant(self) -> bool:
        """Whether `delta` exceeds two of its standard errors; False if either is unknown."""
        if self.delta is None or self.delta_se is None:
            return False
        return abs(self.delta) > 2 * self.delta_se

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, in their order."""
        return asdict(self)


def conditions_sentence(conditions: Mapping[str, str]) -> str:
    """The conditions that all rows of a table share, as `"steps 25; device cpu."`."""
    return "; ".join(f"{name} {value}" for name, value in conditions.items()) + "."


def distance_name(rows: Sequence[SweepRow]) -> str:
    """The name of the distance; it is an FID only with the Inception network."""
    extractor = next((row.extractor for row in rows if row.extractor), "inception")
    return "FID" if extractor == "inception" else f"Fréchet distance ({extractor})"


def merged_labels(rows: Sequence[SweepRow]) -> list[str]:
    """Labels of the merging methods, in the order of their first row."""
    return list(dict.fromkeys(row.label for row in rows if not row.is_baseline))


def keep_rates_of(rows: Sequence[SweepRow]) -> list[float]:
    """Keep rates of all rows, highest first, as in the papers' tables."""
    return sorted({row.keep_rate for row in rows}, reverse=True)


def require_comparable(rows: Sequence[SweepRow]) -> None:
    """Refuse rows whose distances must not appear in one table.

    A Fréchet distance depends on the number of images, on the feature network and on the
    preprocessing; two values are comparable only if all of these are equal.

    Raises:
        ValueError: measured rows differ in one of them, a setting occurs twice, or there are no
            rows.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none.")
    measured = [row for row in rows if row.source == "measured" and row.fid is not None]
    for name in ("extractor", "protocol", "num_generated", "num_reference"):
        values = sorted({str(getattr(row, name)) for row in measured})
        if len(values) > 1:
            raise ValueError(
                f"`rows` must share one `{name}` to be comparable, got {', '.join(values)}."
            )
    settings = [(row.label, row.keep_rate) for row in rows]
    if len(set(settings)) < len(settings):
        twice = next(setting for setting in settings if settings.count(setting) > 1)
        raise ValueError(f"`rows` must name each setting once, got {twice} twice.")
