"""Benchmarks of sd_tokenmerge; `scripts/bench.py` runs them and `scripts/render.py` shows them."""
