"""A comparison as lines of text."""

from __future__ import annotations

from sd_tokenmerge.fid.comparison import Comparison
from sd_tokenmerge.fid.image_change import PairedChange
from sd_tokenmerge.fid.jackknife import NUM_GROUPS


def format_comparison(result: Comparison, change: PairedChange | None = None) -> str:
    """A result as aligned lines of text."""
    name = "FID" if result.extractor == "inception" else "FD"
    rows = [
        (name, _with_error(result.fid, result.fid_se)),
        ("KID x 1000", _with_error(_thousand(result.kid), _thousand(result.kid_se))),
    ]
    if result.kid_subsets is not None:
        mean, std = (1000 * value for value in result.kid_subsets)
        rows.append(("KID x 1000, subsets", f"{mean:.3f}, SD of one {std:.3f}"))
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
            ("PSNR to baseline", f"{change.psnr:.2f} dB, mean ({change.num_identical} identical)"),
            ("SSIM to baseline", f"{change.ssim:.4f}, mean"),
        ]
        if change.feature_distance is not None:
            rows.append(("features to baseline", f"{change.feature_distance:.4f}, mean"))
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
    elif result.num_generated is not None and result.num_generated < 2 * NUM_GROUPS:
        rows.append(("standard errors", f"none with fewer than {2 * NUM_GROUPS} images"))
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
