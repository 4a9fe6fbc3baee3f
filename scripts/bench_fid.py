"""Measure the FID evaluator: speed, numerics, errors. Prints a table; --store puts it into docs/.

python scripts/bench_fid.py speed PHOTOS    images/s from files, against the bare network
python scripts/bench_fid.py distance        seconds at the paper's size
python scripts/bench_fid.py numerics        error of ways to compute the distance, known answers
python scripts/bench_fid.py jackknife       estimated against true standard errors
python scripts/bench_fid.py paper           the same at 2,000 images and 2,048 features
python scripts/bench_fid.py photographs PHOTOS  the same with features of photographs
python scripts/bench_fid.py floor           distance between two sets of the same population
python scripts/bench_fid.py resizing PHOTOS distance that the choice of protocol alone makes
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fid_errors import by_class, jackknife, paper, photographs, population
from measured import Row, describe, publish, this_command

from sd_tokenmerge.fid.distance import Gaussian, frechet_distance, squared_wasserstein
from sd_tokenmerge.fid.extraction import extract
from sd_tokenmerge.fid.extractors import Extractor, find_extractor
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.inception import FIDInceptionV3
from sd_tokenmerge.fid.inception_weights import load_inception
from sd_tokenmerge.fid.jackknife import frechet_replicates
from sd_tokenmerge.fid.kid import kernel_distance, kernel_replicates, self_similarity
from sd_tokenmerge.fid.preprocess import PROTOCOLS
from sd_tokenmerge.processes import Processes


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=256, help="how many photos")
    parser.add_argument(
        "--sets", type=int, default=100, help="simulated sets; small ones: times 50"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of a speed measurement")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its numbers say little")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/fid.md")
    arguments = parser.parse_args()
    if arguments.what in ("speed", "photographs", "resizing") and arguments.photos is None:
        parser.error("name a folder of photographs")
    if arguments.quick:
        arguments.images, arguments.sets, arguments.rounds = 32, 8, 1
    rows = BENCHMARKS[arguments.what](arguments)
    document = describe(rows, this_command())
    publish(f"fid-{arguments.what}", document, store=arguments.store)


BATCH = 32


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def speed(arguments: argparse.Namespace) -> list[Row]:
    """The bare network on one batch in memory and the whole way from files, in turns.

    CPU time per image tells the cost of reading and resizing: on a machine without a GPU, both
    compete for the same processors.
    """
    paths = find_images(arguments.photos)[: arguments.images // BATCH * BATCH]
    rows = []
    for extractor in (random_inception(), find_extractor("efficientnet-lite0", PROTOCOLS["atc"])):
        network = extractor.load()
        batch = torch.randn(BATCH, 3, extractor.image_size, extractor.image_size)

        def bare(network: torch.nn.Module = network, batch: torch.Tensor = batch) -> None:
            with torch.inference_mode():
                for _ in range(len(paths) // BATCH):
                    network(batch)

        def from_files(extractor: Extractor = extractor) -> None:
            extract(
                paths,
                extractor,
                PROTOCOLS["atc"].resize,
                autocast=None,
                batch_size=BATCH,
                num_workers=None,
                processes=Processes.join("cpu"),
                progress=None,
            )

        bare()
        from_files()
        turns = [(_cost(bare), _cost(from_files)) for _ in range(arguments.rounds)]
        ratios = [files[0] / alone[0] for alone, files in turns]
        alone, files = (np.median(costs, axis=0) for costs in zip(*turns, strict=True))
        count = len(paths)
        rows.append(
            {
                "extractor": extractor.name,
                "bare network: images/s": float(count / alone[0]),
                "from files: images/s": float(count / files[0]),
                "speed from files / bare": float(1 / np.median(ratios)),
                "bare: CPU ms/image": float(1000 * alone[1] / count),
                "from files: CPU ms/image": float(1000 * files[1] / count),
            }
        )
    return rows


def _cost(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu


def random_inception() -> Extractor:
    """The network with random weights: as fast as the real one."""
    path = Path(tempfile.mkdtemp()) / "random.pth"
    torch.manual_seed(0)
    torch.save(FIDInceptionV3().state_dict(), path)
    protocol = PROTOCOLS["atc"]
    return Extractor(
        "inception", 299, 2048, "random", protocol.normalize, lambda: load_inception(path)
    )


def numerics(_: argparse.Namespace) -> list[Row]:
    """Known distances of 512-dimensional commuting covariances; errors over the sum of traces."""
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
        "sqrtm (clean-fid, pytorch-fid)": square_root,
        "eigvals (torchmetrics)": eigenvalues,
        "ours": ours,
    }
    rows = []
    for name, (a, b) in cases.items():
        exact = float((a.sqrt() - b.sqrt()).square().sum())
        scale = float(a.sum() + b.sum())
        first, second = ((rotation * values) @ rotation.T for values in (a, b))
        first, second = (first + first.T) / 2, (second + second.T) / 2
        errors = {way: f"{(f(first, second) - exact) / scale:.0e}" for way, f in ways.items()}
        rows.append({"case": name, **errors})
    return rows


def distance(_: argparse.Namespace) -> list[Row]:
    """2,000 against 5,000 images with 2,048 features."""
    draw = population(2048, 0)
    generated, reference = draw(2000) * 1.1, draw(5000)
    groups = by_class(2000)
    fitted = Gaussian.from_features(reference)
    similarity = self_similarity(reference)
    steps: dict[str, Callable[[], object]] = {
        "fit the reference": lambda: Gaussian.from_features(reference),
        "distance": lambda: frechet_distance(fitted, generated),
        "its standard error": lambda: frechet_replicates(generated, fitted, groups),
        "KID: the reference's own part": lambda: self_similarity(reference),
        "KID": lambda: kernel_distance(generated, reference, reference_similarity=similarity),
        "its standard error ": lambda: kernel_replicates(
            generated, reference, groups, reference_similarity=similarity
        ),
    }
    return [{"step": step.strip(), "s": _cost(work)[0]} for step, work in steps.items()]


def floor(_: argparse.Namespace) -> list[Row]:
    """A perfect generator's distance, by the number of its images."""
    draw = population(2048, 0)
    reference = draw(5000)
    fitted, similarity = Gaussian.from_features(reference), self_similarity(reference)
    rows = []
    for count in (500, 1000, 2000, 4000):
        features = draw(count)
        value = squared_wasserstein(Gaussian.from_features(features), fitted)
        kid = kernel_distance(features, reference, reference_similarity=similarity)
        rows.append({"N": count, "distance": value, "KID x 1000": f"{1000 * kid:.3f}"})
    return rows


def resizing(arguments: argparse.Namespace) -> list[Row]:
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
    return [
        {"protocol": name, "distance to atc": frechet_distance(sets["atc"], features)}
        for name, features in sets.items()
        if name != "atc"
    ]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "speed": speed,
    "distance": distance,
    "numerics": numerics,
    "jackknife": jackknife,
    "paper": paper,
    "photographs": photographs,
    "floor": floor,
    "resizing": resizing,
}

if __name__ == "__main__":
    main()
