"""The options of a sweep. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions

PAPER_METHODS = ("tome-sd", "atc:linkage=single", "atc:linkage=average", "atc:linkage=complete")
PAPER_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Table 2 of the ATC paper; its column of 100 % is the unmerged pipeline."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `run_sweep`.

    Attributes:
        out: the sweep's folder.
        generation: how images are generated; the sweep sets `out`, `method` and `keep_rate`.
            With a `shard`, this shard of every setting is generated and nothing is measured.
        methods: method strings, in the order of the table.
        keep_rates: in (0, 1]; 1 is the unmerged pipeline, which is part of every sweep.
        reference: folder of images or `.npz` statistics; None: no distance is measured.
        features: how features are extracted.
        published: whether the ATC paper's values appear beside the measured ones.
        skip_unreachable: leave out keep rates that a method cannot reach instead of refusing them.
        sheet_images: images on the contact sheet, at least 1.
    """

    out: str
    generation: GenerateOptions
    methods: tuple[str, ...] = PAPER_METHODS
    keep_rates: tuple[float, ...] = PAPER_KEEP_RATES
    reference: str | None = None
    features: FeatureOptions = field(default_factory=FeatureOptions)
    published: bool = False
    skip_unreachable: bool = False
    sheet_images: int = 4

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything.

        Raises:
            TypeError: a keep rate is not a number.
            ValueError: methods or keep rates are missing or repeated, or a value is out of range.
        """
        for name in ("methods", "keep_rates"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"`{name}` must hold at least one entry, got none.")
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` must hold each entry once, got {values}.")
        for keep_rate in self.keep_rates:
            if not isinstance(keep_rate, (int, float)):
                raise TypeError(f"`keep_rates` must be numbers, got {keep_rate!r}.")
            if not 0 < keep_rate <= 1:
                raise ValueError(f"`keep_rates` must be in (0, 1], got {keep_rate}.")
        if NO_METHOD in self.methods:
            raise ValueError(f"`methods` must not hold {NO_METHOD!r}: it is always measured.")
        if self.sheet_images < 1:
            raise ValueError(f"`sheet_images` must be at least 1, got {self.sheet_images}.")
