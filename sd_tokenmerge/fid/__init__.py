"""Distances between image sets and their standard errors. Knows nothing of diffusers.

Start with `compare` and `Evaluator` (evaluate.py). Below them: `extract_features` (features.py),
`frechet_distance` (distance.py), `paired_change` (image_change.py), `save_statistics` and
`load_statistics` (statistics.py), `make_reference` (reference.py).
"""
