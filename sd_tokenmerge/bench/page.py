"""The results of a bench as tables and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from sd_tokenmerge.report.captions import short_name
from sd_tokenmerge.report.cells import MISSING, TextTable, number
from sd_tokenmerge.report.page import Page, Picture


def bench_tables(content: dict[str, Any]) -> list[TextTable]:
    """The times of the denoiser's calls, and the times and PSNR of pictures.

    Args:
        content: what `run_bench` returns.
    """
    calls: list[list[str] | None] = [
        [name, number(1000 * row["seconds"], 1), number(row["relative"])]
        for name, row in content["calls"].items()
    ]
    pictures: list[list[str] | None] = [
        [name, number(row["seconds"]), number(row["relative"]), _psnr(row)]
        for name, row in content["pictures"].items()
    ]
    return [
        TextTable("Calls of the denoiser", ["call", "ms", "of unpatched"], calls),
        TextTable("Whole pictures", ["picture", "s", "of full", "PSNR, dB"], pictures),
    ]


def bench_page(content: dict[str, Any], pictures: Sequence[Picture]) -> Page:
    """The page of a finished bench.

    Args:
        content: what `run_bench` returns.
        pictures: the plot and the contact sheet.
    """
    conditions = dict(content["conditions"])
    versions = conditions.pop("versions") | {"commit": conditions.pop("commit")}
    conditions["model"] = model = short_name(conditions["model"])
    conditions["prompts"] = " ".join(conditions["prompts"])
    conditions["quick"] = "yes" if conditions["quick"] else "no"
    return Page(
        title=f"Does merging pay? {model}, {conditions['size']}, on {conditions['device']}",
        lead=content["verdict"],
        pictures=pictures,
        tables=bench_tables(content),
        settings={name.replace("_", " "): str(value) for name, value in conditions.items()},
        versions={name: str(value) for name, value in versions.items() if value is not None},
    )


def _psnr(row: dict[str, Any]) -> str:
    return number(mean(row["psnr_db"]), 1) if row.get("psnr_db") else MISSING
