"""The rows every table and plot is made from: one setting and what was measured for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

BASELINE = "none"
"""The `method` of the unmerged pipeline."""


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One method at one keep rate; what was not measured is None.

    Attributes:
        method: method string, or `BASELINE` for the unmerged pipeline.
        keep_rate: fraction of the tokens that is kept, in (0, 1]; 1 for the unmerged pipeline.
        label: what tables and plots call the method.
        source: `"measured"` here, or `"published"` elsewhere (see `report.published`).
        extractor: feature network of `fid` and `kid`.
        protocol: preprocessing of `fid` and `kid`.
        num_generated: generated images behind `fid`.
        num_reference: reference images behind `fid`.
        fid: Fréchet distance to the reference set. It is the FID only where `extractor` is
            `"inception"`.
        fid_se: standard error of `fid` over other generated images, the reference set held fixed.
        delta: `fid` minus that of the unmerged pipeline.
        delta_se: standard error of `delta`, paired by seed and therefore far smaller than `fid_se`.
        kid: unbiased kernel distance (MMD²) to the reference set.
        kid_se: standard error of `kid`.
        psnr_db: peak signal-to-noise ratio to the unmerged image of the same seed, in dB: the
            median over the images; infinite where they are identical.
        psnr_db_low: 20th percentile of the same.
        psnr_db_high: 80th percentile of the same.
        ssim: structural similarity to the unmerged image of the same seed, in [-1, 1]: the median.
        ssim_low: 20th percentile of the same.
        ssim_high: 80th percentile of the same.
        feature_distance: Euclidean distance to the unmerged image of the same seed in the
            extractor's features: the median.
        seconds_per_image: median time to generate one image.
    """

    method: str
    keep_rate: float
    label: str = ""
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

    def __post_init__(self) -> None:
        """Refuse what no table could show.

        Raises:
            ValueError: `keep_rate` is outside (0, 1], a standard error is negative, or the unmerged
                pipeline is given another keep rate than 1.
        """
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"`keep_rate` must be in (0, 1], got {self.keep_rate}.")
        if self.method == BASELINE and self.keep_rate != 1:
            raise ValueError(
                f"`keep_rate` must be 1 for the unmerged pipeline, got {self.keep_rate}."
            )
        for name in ("fid_se", "delta_se", "kid_se"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")

    @property
    def name(self) -> str:
        """The label, or the method string where there is none."""
        return self.label or ("unmerged" if self.method == BASELINE else self.method)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unmerged pipeline."""
        return self.method == BASELINE

    @property
    def is_significant(self) -> bool:
        """Whether `delta` exceeds two of its standard errors; False where either is unknown."""
        if self.delta is None or self.delta_se is None:
            return False
        return abs(self.delta) > 2 * self.delta_se

    def as_dict(self) -> dict[str, object]:
        """All fields, in their order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SweepRow:
        """The inverse of `as_dict`.

        Raises:
            ValueError: a field is unknown.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"A row has no field {', '.join(map(repr, unknown))}.")
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all rows of one table have in common, so that a number is never shown without it.

    Attributes:
        num_generated: generated images per setting.
        num_reference: reference images.
        extractor: feature network.
        protocol: preprocessing.
        model: the pipeline that generated.
        device: what it ran on.
        settings: anything else that matters, as `{"steps": "25"}`.
        versions: packages and their versions.
    """

    num_generated: int | None = None
    num_reference: int | None = None
    extractor: str | None = None
    protocol: str | None = None
    model: str | None = None
    device: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def parts(self) -> list[tuple[str, str]]:
        """Name and value of everything that is known, in the order a reader needs it."""
        known: list[tuple[str, object]] = [
            ("N generated", self.num_generated),
            ("N reference", self.num_reference),
            ("extractor", self.extractor),
            ("protocol", self.protocol),
            ("model", self.model),
            *self.settings.items(),
            ("device", self.device),
            *self.versions.items(),
        ]
        return [
            (name, f"{value:,}" if isinstance(value, int) else str(value))
            for name, value in known
            if value is not None
        ]

    def line(self) -> str:
        """One sentence naming all of it."""
        return "; ".join(f"{name} {value}" for name, value in self.parts()) + "."


def distance_name(extractor: str | None) -> str:
    """What the distance is called: FID is the name of the Inception network's alone."""
    if extractor is None or extractor == "inception":
        return "FID"
    return f"Fréchet distance ({extractor})"


def baseline_of(rows: Sequence[SweepRow]) -> SweepRow | None:
    """The unmerged pipeline's row, if there is one.

    Raises:
        ValueError: there is more than one.
    """
    found = [row for row in rows if row.is_baseline and row.source == "measured"]
    if len(found) > 1:
        raise ValueError(f"`rows` must hold one unmerged row at most, got {len(found)}.")
    return found[0] if found else None


def methods_of(rows: Sequence[SweepRow]) -> list[str]:
    """Names of the merged methods, in the order of their first row."""
    return list(dict.fromkeys(row.name for row in rows if not row.is_baseline))


def keep_rates_of(rows: Sequence[SweepRow]) -> list[float]:
    """Keep rates of all rows, highest first, as in the papers' tables."""
    return sorted({row.keep_rate for row in rows}, reverse=True)


def require_comparable(rows: Sequence[SweepRow]) -> None:
    """Refuse rows whose distances must not stand in one table.

    A Fréchet distance depends on the number of images, on the feature network and on the
    preprocessing; two values are comparable only where all of these are equal.

    Raises:
        ValueError: measured rows differ in one of them, a setting occurs twice, or there are none.
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
    seen: set[tuple[str, float]] = set()
    for row in rows:
        key = (row.name, row.keep_rate)
        if key in seen:
            raise ValueError(f"`rows` must name each setting once, got {key} twice.")
        seen.add(key)
