"""What a sweep is told. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions

PAPER_METHODS = ("tome-sd", "atc:linkage=single", "atc:linkage=average", "atc:linkage=complete")
PAPER_KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Table 2 of the ATC paper; its column of 100 % is the unmerged pipeline."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `run_sweep`.

    Attributes:
        out: the sweep's folder.
        generation: how every image is made; `out`, `method` and `keep_rate` are set by the sweep.
            With a `shard`, this part of every setting is generated and nothing is measured.
        methods: method strings, in the order of the table.
        keep_rates: in (0, 1]; 1 is the unmerged pipeline, which is always part of a sweep.
        reference: folder of images or `.npz` statistics; None: no distance is measured.
        extractor: see `extract_features`, as the next six.
        protocol: how images are prepared.
        weights: the extractor's weight file.
        download_weights: fetch missing weights.
        allow_unknown_weights: accept weights that are not the public ones.
        precision: of the extractor's arithmetic.
        cache: folder of cached features; None: the user's.
        assume_protocol: how the images of a foreign `.npz` reference were prepared.
        published: show the ATC paper's values beside the measured ones.
        skip_unreachable: leave keep rates out that a method cannot reach, instead of refusing.
        sheet_images: images on the contact sheet, at least 1.
    """

    out: str
    generation: GenerateOptions
    methods: tuple[str, ...] = PAPER_METHODS
    keep_rates: tuple[float, ...] = PAPER_KEEP_RATES
    reference: str | None = None
    extractor: str = "inception"
    protocol: str = "atc"
    weights: str | None = None
    download_weights: bool = False
    allow_unknown_weights: bool = False
    precision: str = "float32"
    cache: str | None = None
    assume_protocol: str | None = None
    published: bool = False
    skip_unreachable: bool = False
    sheet_images: int = 4

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything.

        Raises:
            TypeError: a keep rate is no number.
            ValueError: no or repeated methods or keep rates, or a value out of range.
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
