"""`sd-tokenmerge fid`: the distance between two image sets, with its standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import UserError, user_errors
from sd_tokenmerge.cli.field_options import given_values, with_options
from sd_tokenmerge.cli.progress import FeatureProgress
from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.processes import is_first_process, leave_group

if TYPE_CHECKING:
    from sd_tokenmerge.fid.comparison import Comparison
    from sd_tokenmerge.fid.features import FeatureSet
    from sd_tokenmerge.fid.image_change import PairedChange
    from sd_tokenmerge.fid.statistics import Statistics


@with_options(FeatureOptions)
def fid_command(
    *,
    reference: Annotated[
        str, typer.Argument(help="Folder of reference images, or an .npz file of statistics.")
    ],
    generated: Annotated[
        str | None,
        typer.Argument(
            help="Folder of generated images, or an .npz file; optional with --save-statistics."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Unmerged images with the same names; adds the difference from them."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Do not read or write the cache.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read images. Default: one per core, at most 16.", min=1),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the GPU if there is one.")
    ] = None,
    no_standard_errors: Annotated[
        bool, typer.Option("--no-standard-errors", help="Skip standard errors, which take longest.")
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
        typer.Option("--save-statistics", help="Write the statistics of a single set."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **values: Any,
) -> None:
    """Measure the Frechet distance between two image sets.

    Defaults are ATC's protocol: clean resizing and the Inception network. Features are extracted
    once per set and cached. Results go to stdout, progress to stderr.
    """
    if (generated is None) == (save is None):
        raise UserError("give two image sets, or one with --save-statistics.")
    if no_cache and values["cache"] is not None:
        raise UserError("--cache and --no-cache exclude each other.")
    if save is not None and save.suffix != ".npz":
        raise UserError(f"--save-statistics must end in .npz, got {str(save)!r}.")
    features = FeatureOptions(**given_values(FeatureOptions, values))
    with user_errors(), ExitStack() as stack:
        from sd_tokenmerge.fid.evaluate import compare
        from sd_tokenmerge.fid.sources import load_set, require_set, unfinished_run

        stack.callback(leave_group)
        progress = FeatureProgress()
        stack.callback(progress.stop)
        extraction = features.extraction() | {
            "batch_size": batch_size,
            "num_workers": workers,
            "device": device,
            "progress": progress,
        }
        if no_cache:
            extraction["cache"] = False
        notes = []
        sets = {"reference": reference, "generated": generated, "baseline": baseline}
        for name, source in sets.items():
            if source is not None:
                require_set(name, source)
                if (state := unfinished_run(source)) is not None:
                    notes.append(f"{name}: the run is not complete: {state}.")
        if features.download_weights and features.extractor == "inception" and not features.weights:
            _download()

        def load(source: str) -> FeatureSet | Statistics:
            return load_set(source, assume_protocol=features.assume_protocol, **extraction)

        first = load(reference)
        second = None if generated is None else load(generated)
        unmerged = None if baseline is None else load(baseline)
        if not is_first_process():
            return
        if second is None:
            _save(first, save)
            _print_notes(notes)
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
        result = replace(result, warnings=(*notes, *result.warnings))
        change = None if force else _paired_change(baseline, generated, unmerged, second)
    if as_json:
        print(json.dumps(_to_json(result, change), indent=2))
        return
    from sd_tokenmerge.fid.comparison import format_comparison

    _print_notes(result.warnings)
    print(format_comparison(result, change))


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


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
    baseline: str | None,
    generated: str | None,
    original: FeatureSet | Statistics | None,
    changed: FeatureSet | Statistics,
) -> PairedChange | None:
    """Change of each picture if both sets are folders."""
    from sd_tokenmerge.fid.features import FeatureSet
    from sd_tokenmerge.fid.image_change import paired_change

    if not isinstance(original, FeatureSet) or not isinstance(changed, FeatureSet):
        return None
    if baseline is None or generated is None:
        return None
    if not (Path(baseline).is_dir() and Path(generated).is_dir()):
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
        print(f"Weights: {file.name}, {file.size_mb} MB unless present.", file=sys.stderr)
        download_inception_weights()
