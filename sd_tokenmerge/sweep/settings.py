"""The settings of a sweep: one method at one keep rate each, with its run folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods import parse_method
from sd_tokenmerge.report.cells import keep_rate_text
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions
from sd_tokenmerge.sweep.folder import RUNS
from sd_tokenmerge.sweep.options import SweepOptions


@dataclass(frozen=True)
class Setting:
    """One method at one keep rate.

    Attributes:
        label: the method as the user wrote it; `"unmerged"` for the unmerged pipeline.
        method: its canonical string; `NO_METHOD` for the unmerged pipeline.
        keep_rate: fraction of the tokens that is kept.
        options: of its run; `options.out` is the run folder.
    """

    label: str
    method: str
    keep_rate: float
    options: GenerateOptions

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.options.out)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unmerged pipeline."""
        return self.method == NO_METHOD

    def __str__(self) -> str:
        """For progress and messages."""
        return self.label if self.is_baseline else f"{self.label}, {keep_rate_text(self.keep_rate)}"


def make_settings(options: SweepOptions) -> list[Setting]:
    """The unmerged pipeline, then every method at every keep rate below 1, highest first.

    The unmerged run ignores merging options, so changing them does not regenerate it.

    Raises:
        ValueError: a method string is bad, or two mean the same method.
    """
    runs = Path(options.out) / RUNS
    unmerged = replace(options.generation, out=str(runs / "unmerged"), merging=None)
    settings = [Setting("unmerged", NO_METHOD, 1.0, unmerged)]
    seen: dict[str, str] = {}
    for label in options.methods:
        method = str(parse_method(label))
        if method in seen:
            raise ValueError(
                f"`methods` must hold each method once, got {seen[method]!r} and {label!r}."
            )
        seen[method] = label
        for keep_rate in sorted(options.keep_rates, reverse=True):
            if keep_rate < 1:
                merging = replace(
                    options.generation.merging or MergeConfig(), method=method, keep_rate=keep_rate
                )
                folder = runs / f"{_folder_name(method)}_keep-{keep_rate:g}"
                run = replace(options.generation, out=str(folder), merging=merging)
                settings.append(Setting(label, method, float(keep_rate), run))
    return settings


def _folder_name(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=,-]+", "-", method)
