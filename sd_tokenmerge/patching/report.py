"""What a patch merged, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from sd_tokenmerge.methods.base import Grid


@dataclass(frozen=True)
class BlockReport:
    """What happened at one self-attention.

    Attributes:
        block: the block's name in the UNet.
        level: 0 is the finest resolution.
        merged: whether the patch merges here.
        grid: height and width in tokens in the last call; None before it, and if not merged.
        tokens_before: N in the last call.
        tokens_after: K in the last call.
        times_computed: how many partitions were computed for this block.
        times_reused: how many times a partition from an earlier step or another block was used.
    """

    block: str
    level: int
    merged: bool
    grid: Grid | None = None
    tokens_before: int | None = None
    tokens_after: int | None = None
    times_computed: int = 0
    times_reused: int = 0


@dataclass(frozen=True)
class Report:
    """What a patch has merged so far; `str(report)` is a table.

    Attributes:
        title: the patch's configuration.
        rows: one for each self-attention of the UNet, merged or not, in the order they run.
    """

    title: str
    rows: tuple[BlockReport, ...]

    def __str__(self) -> str:
        width = max(len(row.block) for row in self.rows)
        lines = [
            f"{sum(row.merged for row in self.rows)} of {len(self.rows)} self-attention blocks "
            f"merged: {self.title}",
            f"{'block':{width}}  level  grid     tokens          computed  reused",
        ]
        for row in self.rows:
            grid = f"{row.grid.height}x{row.grid.width}" if row.grid else "-"
            tokens = f"{row.tokens_before} -> {row.tokens_after}" if row.grid else "-"
            line = f"{row.block:{width}}  {row.level:5}  "
            if row.merged:
                line += f"{grid:7}  {tokens:14}  {row.times_computed:8}  {row.times_reused:6}"
            else:
                line += "not merged"
            lines.append(line)
        return "\n".join(lines)
