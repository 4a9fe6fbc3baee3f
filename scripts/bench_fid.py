"""Measure the FID evaluator: speed, numerics, errors. Prints the tables of docs/fid.md.

python scripts/bench_fid.py speed PHOTOS    images/s of each extractor, against the bare network
python scripts/bench_fid.py numerics        error of ways to compute the distance, known answers
python scripts/bench_fid.py distance        seconds at the paper's size
python scripts/bench_fid.py jackknife       estimated against true standard errors
python scripts/bench_fid.py floor           distance between two sets of the same population
python scripts/bench_fid.py resizing PHOTOS distance that the choice of protocol alone makes
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sd_tokenmerge.fid.distance import Gaussian, frechet_distance, squared_wasserstein
from sd_tokenmerge.fid.extraction import extract
from sd_tokenmerge.fid.extractors import Extractor, find_extractor
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.inception import FIDInceptionV3
from sd_tokenmerge.fid.inception_weights import load_inception
from sd_tokenmerge.fid.jackknife import frechet_replicates, jackknife_error, make_groups
from sd_tokenmerge.fid.kid import kernel_distance, kernel_replicates, self_similarity
from sd_tokenmerge.fid.preprocess import PROTOCOLS
from sd_tokenmerge.fid.processes import Processes


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=200, help="how many photos")
    parser.add_argument("--sets", type=int, default=100, help="how many simulated sets")
    parser.add_argument("--paper", action="store_true", help="jackknife at 2,000 x 2,048: minutes")
    arguments = parser.parse_args()
    if arguments.what in ("speed", "resizing") and arguments.photos is None:
        parser.error("name a folder of photographs")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        file=sys.stderr,
    )
    BENCHMARKS[arguments.what](arguments)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def speed(arguments: argparse.Namespace) -> None:
    """Interleave the bare network on one resident batch with the whole way from files.

    The best of three is shown. CPU time tells the cost of reading and resizing even where other
    processes keep the machine busy.
    """
    paths = find_images(arguments.photos)[: arguments.images]
    columns = "extractor|bare: images/s|CPU ms|from files: images/s|CPU ms|ratio of CPU times"
    print("| " + columns.replace("|", " | ") + " |\n|---|---|---|---|---|---|")
    for extractor in (random_inception(), find_extractor("efficientnet-lite0", PROTOCOLS["atc"])):
        network = extractor.load()
        batch = torch.randn(32, 3, extractor.image_size, extractor.image_size)
        rounds = -(-len(paths) // 32)

        def bare(network=network, batch=batch, rounds=rounds) -> None:
            with torch.inference_mode():
                for _ in range(rounds):
                    network(batch)

        def from_files(extractor=extractor) -> None:
            extract(
                paths,
                extractor,
                PROTOCOLS["atc"].resize,
                autocast=None,
                batch_size=32,
                num_workers=None,
                device=torch.device("cpu"),
                processes=Processes(),
                progress=None,
            )

        bare()
        pairs = [(_cost(bare, rounds * 32), _cost(from_files, len(paths))) for _ in range(3)]
        (speed_bare, cpu_bare), (speed_files, cpu_files) = (
            (max(cost[0] for cost in costs), min(cost[1] for cost in costs))
            for costs in zip(*pairs, strict=True)
        )
        print(
            f"| {extractor.name} | {speed_bare:.1f} | {1000 * cpu_bare:.1f} "
            f"| {speed_files:.1f} | {1000 * cpu_files:.1f} | {cpu_files / cpu_bare:.2f} |"
        )


def _cost(work: Callable[[], None], images: int) -> tuple[float, float]:
    """Images per second, and CPU seconds per image."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return images / (time.perf_counter() - started), (time.process_time() - cpu) / images


def random_inception() -> Extractor:
    """The network with random weights: as fast as the real one."""
    path = Path(tempfile.mkdtemp()) / "random.pth"
    torch.manual_seed(0)
    torch.save(FIDInceptionV3().state_dict(), path)
    protocol = PROTOCOLS["atc"]
    return Extractor(
        "inception", 299, 2048, "random", protocol.normalize, lambda: load_inception(path)
    )


def numerics(_: argparse.Namespace) -> None:
    """Known distances of 512-dimensional commuting covariances."""
    import scipy.linalg

    size = 512
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    flat_a, flat_b = (torch.rand(size, dtype=torch.float64) + 0.1 for _ in range(2))
    steep = torch.logspace(0, -12, size, dtype=torch.float64)
    low = (torch.arange(size) < 300).double()
    half = (torch.arange(size) < size // 2).double()
    cases = {
        "well-conditioned": (flat_a, flat_b),
        "condition 1e12": (flat_a * steep, flat_b * steep),
        "rank 300 of 512": (flat_a * low, flat_b * low),
        "disjoint supports": (flat_a * half, flat_b * (1 - half)),
        "identical, condition 1e12": (flat_a * steep, flat_a * steep),
    }

    def ours(a: torch.Tensor, b: torch.Tensor) -> float:
        zero = torch.zeros(size, dtype=torch.float64)
        return squared_wasserstein(
            Gaussian.from_statistics(zero, a), Gaussian.from_statistics(zero, b)
        )

    def square_root(a: torch.Tensor, b: torch.Tensor) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = scipy.linalg.sqrtm((a @ b).numpy())
        return float(a.trace() + b.trace()) - 2 * float(np.trace(root).real)

    def eigenvalues(a: torch.Tensor, b: torch.Tensor) -> float:
        roots = torch.linalg.eigvals(a @ b).sqrt().real.sum()
        return float(a.trace() + b.trace() - 2 * roots)

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
        "sqrtm": square_root,
        "eigvals": eigenvalues,
        "ours": ours,
    }
    print("Error relative to the sum of the traces.\n")
    print("| case | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for name, (a, b) in cases.items():
        exact = float((a.sqrt() - b.sqrt()).square().sum())
        scale = float(a.sum() + b.sum())
        first, second = ((rotation * values) @ rotation.T for values in (a, b))
        first, second = (first + first.T) / 2, (second + second.T) / 2
        errors = [f"{(way(first, second) - exact) / scale:.0e}" for way in ways.values()]
        print(f"| {name} | " + " | ".join(errors) + " |")


def population(size: int, seed: int) -> Callable[[int], torch.Tensor]:
    """Draws sets with a spectrum like that of Inception features (a power law)."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.4
    return lambda count: torch.randn(count, size, generator=generator, dtype=torch.float64) * scale


def distance(_: argparse.Namespace) -> None:
    """2,000 against 5,000 images with 2,048 features."""
    draw = population(2048, 0)
    generated, reference = draw(2000) * 1.1, draw(5000)
    groups = make_groups([f"{i // 2}_{i % 2}.png" for i in range(2000)])
    assert groups is not None
    timer = _Timer()
    fitted = Gaussian.from_features(reference)
    timer("fit the reference")
    value = frechet_distance(fitted, generated)
    timer("distance")
    error = jackknife_error(frechet_replicates(generated, fitted, groups))
    timer("its standard error")
    similarity = self_similarity(reference)
    timer("KID: the reference's own part")
    kid = kernel_distance(generated, reference, reference_similarity=similarity)
    timer("KID")
    kernel_replicates(generated, reference, groups, reference_similarity=similarity)
    timer("its standard error")
    print(f"\ndistance {value:.3f} ± {error:.3f}, KID {kid:.2e}")


class _Timer:
    def __init__(self) -> None:
        print("| step | s |\n|---|---|")
        self.started = time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        print(f"| {step} | {now - self.started:.1f} |", flush=True)
        self.started = time.perf_counter()


def jackknife(arguments: argparse.Namespace) -> None:
    """Spread of many sets' distances against the errors estimated from single ones.

    `apart` moves and widens the generated population; at 0 it is the reference's own, and the
    distance is the floor that only the number of images makes.
    """
    cases = [(64, 400, 0.3), (64, 400, 0.0), (512, 500, 0.3), (512, 500, 0.15), (512, 500, 0.0)]
    if arguments.paper:
        cases = [(2048, 2000, 0.15)]
    columns = "D|N|apart|distance|true SD|jackknife|ratio|pairs: true SD|jackknife|ratio"
    print("| " + columns.replace("|", " | ") + " |")
    print("|" + "---|" * 10)
    for size, count, apart in cases:
        draw = population(size, 0)
        scale = draw(100_000 // size).std(0)
        reference = Gaussian.from_features(draw(5 * count // 2))
        groups = make_groups([f"{i // 2}_{i % 2}.png" for i in range(count)])
        assert groups is not None
        distances, differences, errors, paired = [], [], [], []
        for index in range(arguments.sets):
            baseline = draw(count) * (1 + apart) + apart * scale
            merged = baseline * 1.05 + 0.1 * draw(count)
            a, b = (
                squared_wasserstein(Gaussian.from_features(x), reference)
                for x in (baseline, merged)
            )
            distances.append(a)
            differences.append(b - a)
            if index < max(arguments.sets // 10, 4):
                first = frechet_replicates(baseline, reference, groups)
                second = frechet_replicates(merged, reference, groups)
                errors.append(jackknife_error(first))
                paired.append(jackknife_error(second - first))
        true, true_pairs = float(np.std(distances, ddof=1)), float(np.std(differences, ddof=1))
        error, error_pairs = float(np.mean(errors)), float(np.mean(paired))
        print(
            f"| {size} | {count} | {apart} | {np.mean(distances):.2f} "
            f"| {true:.4f} | {error:.4f} | {error / true:.2f} "
            f"| {true_pairs:.4f} | {error_pairs:.4f} | {error_pairs / true_pairs:.2f} |",
            flush=True,
        )


def floor(arguments: argparse.Namespace) -> None:
    """A perfect generator's distance, by the number of its images."""
    print("| N | distance to 5,000 others | KID x 1000 |\n|---|---|---|")
    draw = population(2048, 0)
    reference = draw(5000)
    fitted, similarity = Gaussian.from_features(reference), self_similarity(reference)
    for count in (500, 1000, 2000, 4000):
        features = draw(count)
        value = squared_wasserstein(Gaussian.from_features(features), fitted)
        kid = kernel_distance(features, reference, reference_similarity=similarity)
        print(f"| {count} | {value:.2f} | {1000 * kid:.3f} |", flush=True)


def resizing(arguments: argparse.Namespace) -> None:
    """The same photographs under two protocols, in EfficientNet-Lite0's features."""
    with tempfile.TemporaryDirectory() as folder:
        for path in find_images(arguments.photos)[: arguments.images]:
            (Path(folder) / path.name).symlink_to(path.resolve())
        sets = {
            name: extract_features(
                folder, extractor="efficientnet-lite0", protocol=name, cache=False
            ).features
            for name in PROTOCOLS
        }
    print("| protocol | distance to atc |\n|---|---|")
    for name, features in sets.items():
        print(f"| {name} | {frechet_distance(sets['atc'], features):.3f} |")


BENCHMARKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": speed,
    "numerics": numerics,
    "distance": distance,
    "jackknife": jackknife,
    "floor": floor,
    "resizing": resizing,
}

if __name__ == "__main__":
    main()
