"""Which pipelines and attention processors of diffusers can be merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import NOT_RUN, table


def outcomes(kind: str) -> Callable[[Path], str]:
    """Makes the table of `"pipelines"` or `"processors"`, grouped by outcome.

    NAME stands for a pipeline's or processor's own name in a refusal.
    """

    def make(store: Path) -> str:
        file = store.parents[1] / "tests" / "conformance" / "outcomes.json"
        if not file.is_file():
            return NOT_RUN
        names: dict[str, list[str]] = {}
        for name, outcome in json.loads(file.read_text(encoding="utf-8"))[kind].items():
            text = re.sub(rf"\b{name}\b", "NAME", _sentence(outcome))
            names.setdefault(text, []).append(f"`{name}`")
        lines = sorted(names.items(), key=lambda line: (-len(line[1]), line[0]))
        return table(["outcome", kind], [(text, ", ".join(found)) for text, found in lines])

    return make


def _sentence(outcome: str | dict[str, str]) -> str:
    if isinstance(outcome, dict):
        working = [f"`{form}`" for form, text in outcome.items() if text == "works"]
        refusals = dict.fromkeys(text for text in outcome.values() if text != "works")
        start = f"{', '.join(working)} works" if len(working) == 1 else f"{', '.join(working)} work"
        return f"{start}; other forms are refused: “{' '.join(refusals)}”"
    if outcome == "works":
        return "every form works"
    return outcome if outcome.startswith("not run") else f"refused: “{outcome}”"
