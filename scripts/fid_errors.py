"""How true the estimated errors of distances are: against the spread of many simulated sets."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measured import Row
from PIL import Image, ImageOps

from sd_tokenmerge.fid.distance import Gaussian
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.jackknife import (
    Groups,
    frechet_of_subsets,
    frechet_replicates,
    jackknife_error,
    make_groups,
)


def population(size: int, seed: int) -> Callable[[int], torch.Tensor]:
    """Draws sets with a spectrum like that of Inception features (a power law)."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.4
    return lambda count: torch.randn(count, size, generator=generator, dtype=torch.float64) * scale


def by_class(count: int) -> Groups:
    """The jackknife's groups of so many images, two of each class."""
    groups = make_groups([f"{i // 2}_{i % 2}.png" for i in range(count)])
    assert groups is not None
    return groups


def jackknife(arguments: argparse.Namespace) -> list[Row]:
    """Spread of many sets' distances against the errors estimated from single ones.

    `apart` moves and widens the generated population; at 0 it is the reference's own, and the
    distance is the floor that only the number of images makes.
    """
    cases = [(64, 400, 0.3, 50), (64, 400, 0.0, 50), (512, 500, 0.3, 6), (512, 500, 0.0, 6)]
    return [
        _simulate(size, count, apart, times * arguments.sets) for size, count, apart, times in cases
    ]


def paper(arguments: argparse.Namespace) -> list[Row]:
    """The same at the size of ATC's experiment."""
    return [_simulate(2048, 2000, apart, arguments.sets) for apart in (0.15, 0.0)]


def _simulate(size: int, count: int, apart: float, sets: int) -> Row:
    draw = population(size, 0)
    scale = draw(100_000 // size).std(0)
    reference = Gaussian.from_features(draw(5 * count // 2))

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        baseline = draw(count) * (1 + apart) + apart * scale
        return baseline, baseline * 1.05 + 0.1 * draw(count)

    return {"D": size, "N": count, "apart": apart, **_spread(pair, reference, sets)}


def photographs(arguments: argparse.Namespace) -> list[Row]:
    """The same with EfficientNet-Lite0's features of photographs: skewed, with heavy tails.

    Half of the photographs are the reference. Sets are drawn from the others, with replacement,
    each photograph and its mirror image as the two images of a class; the merged set is the
    baseline with noise. `D` below 1,280: the first principal components.
    """
    with tempfile.TemporaryDirectory() as folder:
        for index, path in enumerate(find_images(arguments.photos)[:1000]):
            (Path(folder) / f"{index:04d}_0{path.suffix}").symlink_to(path.resolve())
            with Image.open(path) as photo:
                ImageOps.mirror(photo.convert("RGB")).save(Path(folder) / f"{index:04d}_1.png")
        features = extract_features(folder, extractor="efficientnet-lite0").features.double()
    components = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size, count, times in ((64, 400, 20), (64, 2000, 20), (1280, 400, 4), (1280, 100, 8)):
        reduced = features @ components[:size].T if size < len(components) else features
        pairs = reduced.view(-1, 2, size)
        pairs = pairs[torch.randperm(len(pairs), generator=generator)]
        reference, population = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        noise = 0.3 * reduced.std(0)

        def pair(
            count: int = count, population: torch.Tensor = population, noise: torch.Tensor = noise
        ) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = torch.randint(len(population), (count // 2,), generator=generator)
            baseline = population[chosen].flatten(0, 1)
            drawn = torch.randn(baseline.shape, generator=generator, dtype=torch.float64)
            return baseline, baseline + noise * drawn

        fitted = Gaussian.from_features(reference.flatten(0, 1))
        spread = _spread(pair, fitted, times * arguments.sets)
        rows.append({"D": size, "N": count, **spread})
    return rows


def _spread(
    pair: Callable[[], tuple[torch.Tensor, torch.Tensor]], reference: Gaussian, sets: int
) -> Row:
    """Standard deviations over sets, and what the jackknife says of single ones (RMS)."""
    distances, differences, errors, plain, paired = [], [], [], [], []
    for index in range(sets):
        baseline, merged = pair()
        a, b = (_whole_distance(features, reference) for features in (baseline, merged))
        distances.append(a)
        differences.append(b - a)
        if index < min(max(sets // 8, 4), 400):
            groups = by_class(len(baseline))
            first = frechet_replicates(baseline, reference, groups)
            second = frechet_replicates(merged, reference, groups)
            errors.append(jackknife_error(a, first, groups))
            plain.append(jackknife_error(a, first[: groups.num_groups], groups))
            paired.append(jackknife_error(b - a, second - first, groups))
    true, true_pairs = float(np.std(distances, ddof=1)), float(np.std(differences, ddof=1))
    error, uncorrected, error_pairs = (
        float(np.mean(np.square(one)) ** 0.5) for one in (errors, plain, paired)
    )
    return {
        "sets": sets,
        "distance": float(np.mean(distances)),
        "true SD": true,
        "jackknife": error,
        "ratio": f"{error / true:.2f}",
        "uncorrected: ratio": f"{uncorrected / true:.2f}",
        "pairs: true SD": true_pairs,
        "pairs: jackknife": error_pairs,
        "pairs: ratio": f"{error_pairs / true_pairs:.2f}",
    }


def _whole_distance(features: torch.Tensor, reference: Gaussian) -> float:
    """The distance in the jackknife's way: faster, and within 1e-8."""
    everything = torch.ones(len(features), dtype=torch.bool)
    return float(frechet_of_subsets(features, reference, [everything])[0])
