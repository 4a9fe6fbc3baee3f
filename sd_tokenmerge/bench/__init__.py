"""Measure on a machine whether merging pays there: time in turns, pictures, verdict.

`turns`, `calls` and `gate` import no other part of sd_tokenmerge, so that `scripts/bench.py` can
time other commits with them.
"""
