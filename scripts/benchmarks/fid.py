"""Speed of the FID evaluator.

python scripts/bench.py fid --photos PHOTOS     images/s from files, and seconds of the distance
python scripts/bench.py fid                     only the latter
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.markdown import NOT_RUN, Row, table
from benchmarks.options import add_common_options
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from sd_tokenmerge.bench.turns import Cost, take_turns, timed
from sd_tokenmerge.fid.distance import Gaussian, frechet_distance
from sd_tokenmerge.fid.extractors import Extractor, find_extractor
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.fid.inception import FIDInceptionV3
from sd_tokenmerge.fid.jackknife import frechet_replicates, make_groups
from sd_tokenmerge.fid.kid import kernel_distance, kernel_replicates, self_similarity
from sd_tokenmerge.fid.preprocess import PROTOCOLS

BATCH = 32
SPEED_COLUMNS = (
    *("extractor", "bare network: images/s", "from files: images/s", "speed from files / bare"),
    *("bare: CPU ms/image", "from files: CPU ms/image"),
    *MACHINE,
)
DISTANCE_COLUMNS = ("step", "s", *MACHINE)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py fid`."""
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--images", type=int, default=256, help="number of photographs to read")
    add_common_options(parser, minutes=10)


def run(arguments: argparse.Namespace) -> str:
    """Measure, store the rows, return the tables."""
    sizes = (60, 90, 32) if arguments.quick else (2000, 5000, 2048)
    parts = {"fid_distance": (DISTANCE_COLUMNS, distance(*sizes))}
    if arguments.photos is not None:
        parts["fid_speed"] = (SPEED_COLUMNS, speed(arguments))
    machine = describe_machine("cpu")
    texts = []
    for name, (columns, rows) in parts.items():
        complete = [row | machine for row in rows]
        if not arguments.quick:
            append_rows(arguments.out / f"{name}.csv", columns, complete)
        texts.append(plain_table(complete))
    return "\n\n".join(texts)


def speed(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The bare network on a batch in memory, and extraction from files, in turns.

    CPU time per image tells the cost of reading and resizing: on a machine without a GPU, both
    compete for the same processors.
    """
    found = find_images(arguments.photos)
    count = min(arguments.images, len(found)) // BATCH * BATCH
    if not count:
        sys.exit(f"--photos must hold at least {BATCH} images, got {len(found)}.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for index, path in enumerate(found[:count]):
            (photos / f"{index}{path.suffix}").symlink_to(path.resolve())
        lite = find_extractor("efficientnet-lite0", PROTOCOLS["atc"])
        for extractor in (random_inception(), lite):
            network = extractor.load()
            batch = torch.randn(BATCH, 3, extractor.image_size, extractor.image_size)

            def bare(network: torch.nn.Module = network, batch: Tensor = batch) -> Cost:
                with torch.inference_mode():
                    return timed(lambda: [network(batch) for _ in range(count // BATCH)])

            def from_files(extractor: Extractor = extractor) -> Cost:
                options = {"batch_size": BATCH, "device": "cpu", "cache": False}
                return timed(lambda: extract_features(photos, extractor=extractor, **options))

            bare()
            from_files()
            timings = take_turns(
                ("bare", bare),
                {"files": from_files},
                seconds=arguments.minutes * 30,
                rounds=arguments.rounds,
            )
            wall = {name: median(one.seconds) / count for name, one in timings.items()}
            cpu = {
                name: 1000 * median(cost.cpu for cost in one.costs) / count
                for name, one in timings.items()
            }
            values = [1 / wall["bare"], 1 / wall["files"], 1 / median(timings["files"].relative)]
            values += [cpu["bare"], cpu["files"]]
            texts = [extractor.name, *(f"{value:.3g}" for value in values)]
            rows.append(dict(zip(SPEED_COLUMNS, texts, strict=False)))
    return rows


def random_inception() -> Extractor:
    """Inception with random weights, which is as fast as the real one."""
    normalize = PROTOCOLS["atc"].normalize
    return Extractor("inception", 299, 2048, "random", normalize, lambda: FIDInceptionV3().eval())


def distance(generated_images: int, reference_images: int, size: int) -> list[dict[str, str]]:
    """Seconds of each step of a comparison, with features of a power-law spectrum."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.4

    def draw(count: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64) * scale

    generated, reference = draw(generated_images) * 1.1, draw(reference_images)
    groups = make_groups([f"{i // 2}_{i % 2}.png" for i in range(generated_images)])
    assert groups is not None
    fitted, similarity = Gaussian.from_features(reference), self_similarity(reference)
    steps: dict[str, Callable[[], object]] = {
        "fit the reference": lambda: Gaussian.from_features(reference),
        "distance": lambda: frechet_distance(fitted, Gaussian.from_features(generated)),
        "standard error of the distance": lambda: frechet_replicates(generated, fitted, groups),
        "KID: the reference's own part": lambda: self_similarity(reference),
        "KID": lambda: kernel_distance(generated, reference, reference_similarity=similarity),
        "standard error of the KID": lambda: kernel_replicates(
            generated, reference, groups, reference_similarity=similarity
        ),
    }
    return [{"step": step, "s": f"{timed(work).wall:.3g}"} for step, work in steps.items()]


def plain_table(rows: Sequence[Row]) -> str:
    """All columns but those of the machine, which follow in a sentence.

    Only the rows of the newest measurement are shown.
    """
    if not rows:
        return NOT_RUN
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    names = [name for name in rows[0] if name not in MACHINE]
    first = rows[0]
    where = f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}, commit "
    where += f"{first['commit']}, {first['date'][:10]}."
    return f"{table(names, [[row[name] for name in names] for row in rows])}\n\n{where}"


def measured(name: str) -> Callable[[Path], str]:
    """The plain table of a file of the store."""
    return lambda folder: plain_table(read_rows(folder / f"{name}.csv"))
