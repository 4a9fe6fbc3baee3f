"""What a patch merged, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from sd_tokenmerge.methods.base import Grid


@dataclass(frozen=True)
class BlockReport:
    """What happened at one self-attention.

    Attributes:
        block: the block's name in the denoiser.
        level: 0 is the finest resolution.
        merged: whether the patch merges here.
        grid: of the tokens in the last call; None before it, and if not merged.
        text_tokens: that joined the image's in the last call; they are never merged.
        tokens_before: N in the last call.
        tokens_after: K in the last call.
        times_computed: how many partitions were computed for this block.
        times_reused: how many times a partition from an earlier step or another block was used.
    """

    block: str
    level: int
    merged: bool
    grid: Grid | None = None
    text_tokens: int = 0
    tokens_before: int | None = None
    tokens_after: int | None = None
    times_computed: int = 0
    times_reused: int = 0


@dataclass(frozen=True)
class Report:
    """What a patch has merged so far; `str(report)` is a table.

    Attributes:
        title: the patch's configuration.
        rows: one for each self-attention of the denoiser, merged or not, in the order they run.
    """

    title: str
    rows: tuple[BlockReport, ...]

    def __str__(self) -> str:
        head = ["block", "level", "grid", "tokens", "computed", "reused"]
        align = ["left", "right", "left", "left", "right", "right"]
        table = tabulate(
            [_cells(row) for row in self.rows], head, "plain", disable_numparse=True, colalign=align
        )
        count = sum(row.merged for row in self.rows)
        return f"{count} of {len(self.rows)} self-attention blocks merged: {self.title}\n{table}"


def _cells(row: BlockReport) -> list[str]:
    if not row.merged:
        return [row.block, str(row.level), "not merged", "", "", ""]
    counts = [str(row.times_computed), str(row.times_reused)]
    return [row.block, str(row.level), *_grid_and_tokens(row), *counts]


def _grid_and_tokens(row: BlockReport) -> list[str]:
    if row.grid is None:
        return ["-", "-"]
    text = f", {row.text_tokens} of text" if row.text_tokens else ""
    return [str(row.grid), f"{row.tokens_before} -> {row.tokens_after}{text}"]
