"""Distances between image sets: features, statistics, errors. Knows nothing of diffusers.

Doors: `compare` and `Evaluator` (evaluate.py), `extract_features` (features.py), `frechet_distance`
(distance.py), `paired_change` (image_change.py), `save_statistics` and `load_statistics`
(statistics.py), `make_reference` (reference.py).
"""
