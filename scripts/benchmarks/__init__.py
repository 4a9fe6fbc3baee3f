"""Benchmarks of sd_tokenmerge; `scripts/bench.py` runs them and `scripts/render.py` shows them."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# A worker imports another commit's sd_tokenmerge, but times it with this checkout's `bench`.
_BENCH = Path(__file__).resolve().parents[2] / "sd_tokenmerge" / "bench"
_spec = spec_from_file_location(
    "sd_tokenmerge.bench", _BENCH / "__init__.py", submodule_search_locations=[str(_BENCH)]
)
if "sd_tokenmerge.bench" not in sys.modules:
    sys.modules["sd_tokenmerge.bench"] = module_from_spec(_spec)
