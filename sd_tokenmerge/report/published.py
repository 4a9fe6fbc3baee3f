"""Distances published elsewhere, quoted to stand beside measured ones."""

from __future__ import annotations

from sd_tokenmerge.report.rows import SweepRow
from sd_tokenmerge.sampling.options import NO_METHOD

ATC_SOURCE = (
    "Haurum, Escalera, Taylor, Moeslund: Agglomerative Token Clustering, ECCV 2024, Table 2. "
    "Stable Diffusion 1.5, 512x512, 50 steps, guidance 7.5, 2,000 images against 5,000 of the "
    "ImageNet validation set, clean-fid."
)
"""The source of `atc_table2`, and how it was measured."""

_KEEP_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_ATC_TABLE2 = {
    ("tome-sd", "ToMe"): (33.80, 33.77, 33.61, 33.59, 33.57, 33.63, 33.67),
    ("atc:linkage=single", "ATC single"): (33.80, 33.63, 33.48, 33.53, 33.43, 34.01, 36.95),
    ("atc", "ATC average"): (33.80, 33.51, 33.45, 33.33, 33.40, 33.36, 33.22),
    ("atc:linkage=complete", "ATC complete"): (33.80, 33.67, 33.71, 33.70, 33.74, 33.56, 33.65),
}


def atc_table2() -> list[SweepRow]:
    """Table 2 of the ATC paper: the unmerged row, then four methods at six keep rates each.

    The values were published without errors. Published baselines of this set-up range from 28.84 to
    34.23, so absolute values are comparable within one set-up only; compare differences from the
    baseline.
    """
    baseline = _ATC_TABLE2["tome-sd", "ToMe"][0]
    rows = [_row(NO_METHOD, "unmerged (paper)", 1.0, baseline, baseline)]
    for (method, label), values in _ATC_TABLE2.items():
        rows += [
            _row(method, f"{label} (paper)", keep_rate, fid, baseline)
            for keep_rate, fid in zip(_KEEP_RATES[1:], values[1:], strict=True)
        ]
    return rows


def _row(method: str, label: str, keep_rate: float, fid: float, baseline: float) -> SweepRow:
    return SweepRow(
        method=method,
        keep_rate=keep_rate,
        label=label,
        source="published",
        extractor="inception",
        protocol="atc",
        num_generated=2000,
        num_reference=5000,
        fid=fid,
        delta=None if method == NO_METHOD else round(fid - baseline, 2),
    )
