"""Rows as a sweep of two methods at three keep rates would give them."""

from __future__ import annotations

import math
from typing import Any

from sd_tokenmerge.report.rows import SweepRow
from sd_tokenmerge.sampling.options import NO_METHOD

COMMON: dict[str, Any] = {
    "extractor": "efficientnet-lite0",
    "protocol": "atc",
    "num_generated": 240,
    "num_reference": 600,
}
CONDITIONS = {
    "N generated": "240",
    "extractor": "efficientnet-lite0",
    "model": "some_pipeline",
    "size": "256x256",
    "steps": "25",
    "device": "CPU",
    "torch": "2.13.0",
}


def example_rows(**changes: Any) -> list[SweepRow]:
    common = {**COMMON, **changes}
    infinite = {f"psnr_db{end}": math.inf for end in ("", "_low", "_high")}
    rows = [
        SweepRow(
            method=NO_METHOD,
            label="unmerged",
            keep_rate=1,
            fid=40.0,
            fid_se=1.5,
            kid=0.0125,
            ssim=1.0,
            seconds_per_image=2.0,
            **infinite,
            **common,
        )
    ]
    for method, slope in (("atc:linkage=single", 1.0), ("random", 10.0)):
        for keep_rate in (0.7, 0.5, 0.4):
            delta = slope * (1 - keep_rate)
            rows.append(
                SweepRow(
                    method=method,
                    label=method,
                    keep_rate=keep_rate,
                    fid=40 + delta,
                    fid_se=1.5,
                    delta=delta,
                    delta_se=0.2,
                    kid=0.0125 + delta / 1000,
                    kid_se=0.001,
                    psnr_db=40 - delta,
                    psnr_db_low=38 - delta,
                    psnr_db_high=43 - delta,
                    ssim=0.99 - delta / 100,
                    ssim_low=0.98 - delta / 100,
                    ssim_high=0.995 - delta / 100,
                    seconds_per_image=1.5,
                    **common,
                )
            )
    return rows
