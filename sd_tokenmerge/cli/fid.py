"""`sd-tokenmerge fid`: the distance between two image sets, and how sure it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sd_tokenmerge.cli.errors import UserError, user_errors
from sd_tokenmerge.cli.progress import ConsoleProgress

if TYPE_CHECKING:
    from sd_tokenmerge.fid.evaluate import Comparison
    from sd_tokenmerge.fid.image_change import PairedChange


def fid_command(
    reference: Annotated[
        Path, typer.Argument(help="Folder of reference images, or an .npz file of statistics.")
    ],
    generated: Annotated[
        Path | None,
        typer.Argument(help="The other set; left out only with --save-statistics."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Unmerged images of the same names: adds the difference to them."),
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception (an FID), efficientnet-lite0 (offline), clip or dinov2.")
    ] = "inception",
    protocol: Annotated[
        str, typer.Option(help="How images are prepared: atc, pytorch-fid or torchmetrics.")
    ] = "atc",
    weights: Annotated[
        Path | None, typer.Option(help="The network's weight file; default: the usual places.")
    ] = None,
    download_weights: Annotated[
        bool, typer.Option("--download-weights", help="Fetch missing weights (96 MB).")
    ] = False,
    allow_unknown_weights: Annotated[
        bool,
        typer.Option("--allow-unknown-weights", help="Accept weights with another checksum."),
    ] = False,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 or float16 (faster, other numbers).")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read images; default: all processors.", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of cached features; default: the user's cache.")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor write the cache.")
    ] = False,
    no_standard_errors: Annotated[
        bool, typer.Option("--no-standard-errors", help="Skip them: they take longest.")
    ] = False,
    manifold: Annotated[
        bool, typer.Option("--manifold", help="Add precision, recall, density and coverage.")
    ] = False,
    assume_protocol: Annotated[
        str | None,
        typer.Option(help="How the images of a foreign .npz file were prepared."),
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
    with user_errors(), _progress() as progress:
        from sd_tokenmerge.fid.evaluate import ExtractionOptions, compare

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
        if generated is None:
            assert save is not None
            _save(reference, save, extraction)
            return
        result = compare(
            reference,
            generated,
            baseline=baseline,
            standard_error=not no_standard_errors,
            manifold=manifold,
            assume_protocol=assume_protocol,
            force=force,
            **extraction,
        )
        change = None
        if baseline is not None and baseline.is_dir() and generated.is_dir() and not force:
            from sd_tokenmerge.fid.image_change import paired_change

            change = paired_change(baseline, generated)
    if not _is_main_process():
        return
    if as_json:
        print(json.dumps(_to_json(result, change), indent=2))
        return
    for warning in result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print(format_comparison(result, change))


def format_comparison(result: Comparison, change: PairedChange | None = None) -> str:
    """A result as aligned lines of text."""
    name = "FID" if result.extractor == "inception" else "FD"
    rows = [
        (name, _with_error(result.fid, result.fid_se)),
        ("KID x 1000", _with_error(_thousand(result.kid), _thousand(result.kid_se))),
    ]
    if result.delta is not None:
        delta = result.delta
        mark = {None: "", True: "  exceeds 2 SE", False: "  within 2 SE"}[delta.significant]
        rows += [
            (f"{name} - baseline", _with_error(delta.fid, delta.fid_se, sign="+") + mark),
            (
                "KID x 1000 - baseline",
                _with_error(_thousand(delta.kid), _thousand(delta.kid_se), sign="+"),
            ),
        ]
    if change is not None:
        rows += [
            ("PSNR to baseline", f"{change.psnr:.2f} dB ({change.num_identical} identical)"),
            ("SSIM to baseline", f"{change.ssim:.4f}"),
        ]
    if result.manifold is not None:
        rows += [
            ("precision, recall", f"{result.manifold.precision:.4f}, {result.manifold.recall:.4f}"),
            ("density, coverage", f"{result.manifold.density:.4f}, {result.manifold.coverage:.4f}"),
        ]
    known = [count if count is not None else "unknown" for count in _counts(result)]
    rows += [
        ("images", f"{known[0]} reference, {known[1]} generated"),
        ("features", f"{result.num_features} of {result.extractor}, weights {_short(result)}"),
        ("protocol", f"{result.protocol}, {result.precision}"),
    ]
    if result.groups is not None:
        rows.append(("standard errors", f"jackknife, {result.groups}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _counts(result: Comparison) -> tuple[int | None, int | None]:
    return result.num_reference, result.num_generated


def _short(result: Comparison) -> str:
    return (result.weights_sha256 or "unknown")[:8]


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _to_json(result: Comparison, change: PairedChange | None) -> dict[str, object]:
    values = result.to_dict()
    if change is not None:
        identical = change.num_identical == change.num_images
        values["change"] = {
            "psnr": None if identical else change.psnr,  # JSON has no infinity
            "ssim": change.ssim,
            "num_identical": change.num_identical,
        }
    return values


def _save(folder: Path, target: Path, extraction: object) -> None:
    from sd_tokenmerge.fid.features import extract_features
    from sd_tokenmerge.fid.statistics import save_statistics

    features = extract_features(folder, **extraction)  # type: ignore[arg-type]
    if _is_main_process():
        save_statistics(features, target)
        print(f"{target}: {features.num_images} images, {features.space}")


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    bar = ConsoleProgress("Features")

    def advance(done: int, total: int) -> None:
        if done == 0:
            bar.stop()
            bar.start(total, 0)
        bar.update([done])
        if done == total:
            bar.stop()

    try:
        yield advance
    finally:
        bar.stop()
