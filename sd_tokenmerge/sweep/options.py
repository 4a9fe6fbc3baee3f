"""The options of a sweep. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.options import option, require_options
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions

PAPER_METHODS = ("tome-sd", "atc:linkage=single", "atc:linkage=average", "atc:linkage=complete")
PAPER_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Table 2 of the ATC paper; its column of 100 % is the unmerged pipeline."""

_SWEEP: dict[str, Any] = {"panel": "Sweep"}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `run_sweep`.

    Attributes:
        out: the sweep's folder.
        generation: how images are generated. The sweep sets `out`, and the method and keep rate in
            `merging`. With a `shard`, this shard of every setting is generated and nothing is
            measured.
        features: how features are extracted.
        methods: method strings, in the order of the table.
        keep_rates: in (0, 1]; 1 is the unmerged pipeline, which is part of every sweep.
        reference: folder of images or `.npz` statistics; None: no distance is measured.
        published: whether the ATC paper's values appear beside the measured ones.
        skip_unreachable: leave out keep rates that a method cannot reach instead of refusing them.
        sheet_images: images on the contact sheet.
    """

    out: str
    generation: GenerateOptions
    features: FeatureOptions = field(default_factory=FeatureOptions)
    methods: tuple[str, ...] = PAPER_METHODS
    keep_rates: tuple[float, ...] = PAPER_KEEP_RATES
    reference: str | None = option(
        "Folder of reference images, or .npz statistics. Without one, no distance is measured, "
        "only the change from the unmerged images.",
        default=None,
        **_SWEEP,
    )
    published: bool = option(
        "Show the ATC paper's Table 2 beside the results.", default=False, **_SWEEP
    )
    skip_unreachable: bool = option(
        "Leave out keep rates that a method cannot reach instead of refusing them.",
        default=False,
        **_SWEEP,
    )
    sheet_images: int = option(
        "Images on the contact sheet, each of another class.", default=4, at_least=1, **_SWEEP
    )

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything.

        Raises:
            TypeError: a value is of the wrong type.
            ValueError: methods or keep rates are missing or repeated, or a value is out of range.
        """
        require_options(self)
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
        if self.generation.merging is None:
            raise ValueError("`generation` must have merging options, got None.")
