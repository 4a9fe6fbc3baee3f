"""Fill the tables of the documents from the rows in docs/benchmarks/, and from tests/conformance/.

    python scripts/render.py            rewrite the documents
    python scripts/render.py --check    fail if one differs from its rows

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Of rows with the same
conditions, the last one counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import (
    against,
    clustering,
    compiled,
    fid,
    memory,
    pipelines,
    quality_tables,
    transformer,
    transformer_error,
    unet,
)
from benchmarks.rows import ROOT, STORE

FID_TABLES = (
    *("resizing", "floor", "jackknife", "photographs", "paper", "numerics", "distance", "speed"),
)
TABLES: Mapping[str, Callable[[Path], str]] = {
    "unet": unet.step_times,
    "self-attention": unet.self_attention_times,
    "transformer": transformer.block_times,
    "transformer-error": transformer_error.errors,
    "against": against.comparisons,
    "memory": memory.memory_use,
    "compile": compiled.compile_times,
    "quality": quality_tables.quality,
    "frontier": quality_tables.frontier_table,
    "paired": quality_tables.paired,
    "presets": quality_tables.presets,
    "clustering": clustering.clustering_times,
    "costs": clustering.costs,
    "pipelines": pipelines.outcomes("pipelines"),
    "processors": pipelines.outcomes("processors"),
    **{f"fid-{name}": fid.measured(f"fid_{name}") for name in FID_TABLES},
}
"""By name: a function from the store's folder to the text between the markers."""

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", re.DOTALL)


def render(text: str, store: Path = STORE) -> str:
    """A document with all its tables filled in.

    Raises:
        ValueError: there is no table of a block's name.
    """

    def fill(block: re.Match[str]) -> str:
        name = block[1]
        if name not in TABLES:
            raise ValueError(f"a block must be one of {', '.join(TABLES)}, got {name!r}.")
        return f"<!-- begin {name} -->\n\n{TABLES[name](store)}\n\n<!-- end {name} -->"

    return BLOCK.sub(fill, text)


def main() -> int:
    """Rewrite or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    differ = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered == text:
            continue
        differ = 1
        if is_check:
            print(f"{document} differs from its rows: run scripts/render.py.", file=sys.stderr)
        else:
            document.write_text(rendered, encoding="utf-8")
            print(f"{document} rewritten", file=sys.stderr)
    return differ if is_check else 0


if __name__ == "__main__":
    sys.exit(main())
