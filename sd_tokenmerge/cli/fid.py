"""`sd-tokenmerge fid`: the distance between two image sets, and how sure it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sd_tokenmerge.cli.errors import UserError, user_errors
from sd_tokenmerge.cli.feature_options import (
    AllowUnknownWeights,
    AssumeProtocol,
    Cache,
    DownloadWeights,
    Extractor,
    Precision,
    Protocol,
    Weights,
)
from sd_tokenmerge.cli.progress import ConsoleProgress
from sd_tokenmerge.processes import is_first_process, leave_group

if TYPE_CHECKING:
    from sd_tokenmerge.fid.comparison import Comparison
    from sd_tokenmerge.fid.features import FeatureSet
    from sd_tokenmerge.fid.image_change import PairedChange
    from sd_tokenmerge.fid.statistics import Statistics


def fid_command(
    reference: Annotated[
        Path, typer.Argument(help="Folder of reference images, or an .npz file of statistics.")
    ],
    generated: Annotated[
        Path | None,
        typer.Argument(help="Those to be judged, likewise; left out only with --save-statistics."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Unmerged images of the same names: adds the difference to them."),
    ] = None,
    extractor: Extractor = "inception",
    protocol: Protocol = "atc",
    weights: Weights = None,
    download_weights: DownloadWeights = False,
    allow_unknown_weights: AllowUnknownWeights = False,
    precision: Precision = "float32",
    cache: Cache = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor write the cache.")
    ] = False,
    assume_protocol: AssumeProtocol = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read images; default: one per core, at most 16.", min=1),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the GPU if there is one.")
    ] = None,
    no_standard_errors: Annotated[
        bool, typer.Option("--no-standard-errors", help="Leave them out: they take longest.")
    ] = False,
    manifold: Annotated[
        bool, typer.Option("--manifold", help="Add precision, recall, density and coverage.")
    ] = False,
    kid_subset_size: Annotated[
        int | None,
        typer.Option(help="Also average KID over 100 random subsets of this size.", min=2),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compare with a baseline of another size.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option("--save-statistics", help="Write the statistics of the one set given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the Frechet distance between two image sets.

    Defaults are ATC's protocol: clean resizing and the Inception network. Features are extracted
    once per set and cached. Results go to stdout, progress to stderr.
    """
    if (generated is None) == (save is None):
        raise UserError("give two image sets, or one with --save-statistics.")
    if no_cache and cache is not None:
        raise UserError("--cache and --no-cache exclude each other.")
    if save is not None and save.suffix != ".npz":
        raise UserError(f"--save-statistics must end in .npz, got `{save}`.")
    with user_errors(), _progress() as progress, _process_group():
        from sd_tokenmerge.fid.evaluate import compare
        from sd_tokenmerge.fid.sources import ExtractionOptions, load_set, require_one_set

        if download_weights and extractor == "inception" and weights is None:
            _download()
        extraction = ExtractionOptions(
            extractor=extractor,
            protocol=protocol,
            weights=weights,
            download_weights=download_weights,
            allow_unknown_weights=allow_unknown_weights,
            precision=precision,
            batch_size=batch_size,
            num_workers=workers,
            device=device,
            cache=False if no_cache else cache or True,
            progress=progress,
        )
        sets = {"reference": reference, "generated": generated, "baseline": baseline}
        for name, folder in sets.items():
            if folder is not None:
                require_one_set(name, folder)
        load = partial(load_set, assume_protocol=assume_protocol, **extraction)
        first = load(reference)
        second = None if generated is None else load(generated)
        unmerged = None if baseline is None else load(baseline)
        if not is_first_process():
            return
        if second is None:
            _save(first, save)
            return
        result = compare(
            first,
            second,
            baseline=unmerged,
            standard_error=not no_standard_errors,
            kid_subset_size=kid_subset_size,
            manifold=manifold,
            force=force,
        )
        change = None if force else _paired_change(baseline, generated, unmerged, second)
    if as_json:
        print(json.dumps(_to_json(result, change), indent=2))
        return
    from sd_tokenmerge.fid.comparison import format_comparison

    for warning in result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print(format_comparison(result, change))


def _to_json(result: Comparison, change: PairedChange | None) -> dict[str, object]:
    values = result.to_dict()
    if change is not None:
        identical = change.num_identical == change.num_images
        values["change"] = {
            "psnr": None if identical else change.psnr,  # JSON has no infinity
            "ssim": change.ssim,
            "feature_distance": change.feature_distance,
            "num_identical": change.num_identical,
        }
    return values


def _paired_change(
    baseline: Path | None,
    generated: Path | None,
    original: FeatureSet | Statistics | None,
    changed: FeatureSet | Statistics,
) -> PairedChange | None:
    """Change of each picture, where both sets are folders."""
    from sd_tokenmerge.fid.features import FeatureSet
    from sd_tokenmerge.fid.image_change import paired_change

    if not isinstance(original, FeatureSet) or not isinstance(changed, FeatureSet):
        return None
    if baseline is None or generated is None or not (baseline.is_dir() and generated.is_dir()):
        return None
    return paired_change(baseline, generated, features=(original, changed))


def _save(source: FeatureSet | Statistics, target: Path | None) -> None:
    from sd_tokenmerge.fid.features import FeatureSet
    from sd_tokenmerge.fid.statistics import save_statistics

    if target is None or not isinstance(source, FeatureSet):
        raise UserError("--save-statistics needs images, got statistics without features.")
    save_statistics(source, target)
    print(f"{target}: {source.num_images} images, {source.space}")


def _download() -> None:
    from sd_tokenmerge.fid.inception_weights import PUBLIC_FILES, download_inception_weights

    if is_first_process():
        file = PUBLIC_FILES[0]
        print(f"Weights: {file.name}, {file.size_mb} MB unless there already.", file=sys.stderr)
        download_inception_weights()


@contextmanager
def _process_group() -> Iterator[None]:
    """Leave the group of processes in the end, if this is one of several."""
    try:
        yield
    finally:
        leave_group()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    bar = ConsoleProgress("Features")

    def advance(done: int, total: int) -> None:
        if not is_first_process():
            return
        if done == 0:
            bar.stop()
            bar.start(total, 0)
        bar.update(done)
        if done == total:
            bar.stop()

    try:
        yield advance
    finally:
        bar.stop()
