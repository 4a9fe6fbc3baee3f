"""How features are extracted: options that `fid` and `sweep` have in common."""

from __future__ import annotations

from typing import Annotated

import typer

_FEATURES = "Features"

Extractor = Annotated[
    str,
    typer.Option(
        help="inception (an FID), efficientnet-lite0 (offline), clip or dinov2.",
        rich_help_panel=_FEATURES,
    ),
]
Protocol = Annotated[
    str,
    typer.Option(
        help="How images are prepared: atc, pytorch-fid or torchmetrics.",
        rich_help_panel=_FEATURES,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="The network's weight file; default: the usual places.", rich_help_panel=_FEATURES
    ),
]
DownloadWeights = Annotated[
    bool,
    typer.Option(
        "--download-weights", help="Fetch missing weights (96 MB).", rich_help_panel=_FEATURES
    ),
]
AllowUnknownWeights = Annotated[
    bool,
    typer.Option(
        "--allow-unknown-weights",
        help="Accept weights with another checksum.",
        rich_help_panel=_FEATURES,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of the network: float32, or bfloat16 or float16 (faster, other numbers).",
        rich_help_panel=_FEATURES,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Folder of cached features; default: $SD_TOKENMERGE_CACHE, else "
        "~/.cache/sd-tokenmerge.",
        rich_help_panel=_FEATURES,
    ),
]
AssumeProtocol = Annotated[
    str | None,
    typer.Option(
        help="How the images of a foreign .npz file were prepared.", rich_help_panel=_FEATURES
    ),
]
