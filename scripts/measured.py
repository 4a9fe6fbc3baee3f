"""Measured tables: rows in docs/measured/, with how they came about, and the tables made of them.

`python scripts/measured.py` writes all tables in docs/ again. A document holds a table between
`<!-- measured: NAME -->` and `<!-- end -->`; its numbers are never edited by hand.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sd_tokenmerge.files import write_atomically
from sd_tokenmerge.sampling.description import surroundings

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "measured"

Row = Mapping[str, Any]

_BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def describe(rows: Sequence[Row], command: str, device: str = "cpu") -> dict[str, Any]:
    """A document of rows: what was run, where, with which versions."""
    return {
        "command": command,
        **surroundings(device),
        "threads": torch.get_num_threads(),
        "rows": [dict(row) for row in rows],
    }


def this_command() -> str:
    """The command line of this script, with paths outside the repository left out."""
    arguments = [word for word in sys.argv[1:] if word != "--store"]
    before = ["", *arguments]
    named = [
        word if not Path(word).is_dir() else "MODEL" if option == "--model" else "PHOTOS"
        for option, word in zip(before, arguments, strict=False)
    ]
    return f"python scripts/{Path(sys.argv[0]).name} {shlex.join(named)}".strip()


def publish(name: str, document: Mapping[str, Any], *, store: bool) -> None:
    """Print a document as a table; if asked, keep it and update the tables in docs/."""
    print(table(document))
    if store:
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomically(FOLDER / f"{name}.json", text.encode())
        update_documents()


def table(document: Mapping[str, Any]) -> str:
    """A document as a Markdown table with its conditions below."""
    rows = document["rows"]
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    versions = document["versions"]
    where = [
        document["device"]["name"],
        f"{document['threads']} thread(s)",
        f"torch {versions['torch']}",
        f"commit {_short(document['commit'])}",
        document["created"][:10],
    ]
    return f"{text}\n\n`{document['command']}`: {', '.join(where)}."


def fill(text: str) -> str:
    """A document's text with every table made from its rows; empty where there are none yet."""

    def replace(match: re.Match[str]) -> str:
        path = FOLDER / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}{match[3]}"
        rows = json.loads(path.read_text(encoding="utf-8"))
        return f"{match[1]}{table(rows)}\n{match[3]}"

    return _BLOCK.sub(replace, text)


def update_documents() -> None:
    """Write all tables in docs/ again."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            write_atomically(path, filled.encode())


def _short(commit: str | None) -> str:
    """A commit's first digits, with "+" where the package was changed since."""
    return "unknown" if commit is None else commit[:9] + ("+" if commit.endswith("+") else "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    update_documents()
