"""`FeatureOptions`: how features are extracted, declared once. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sd_tokenmerge.options import option, require_options

_FEATURES: dict[str, Any] = {"panel": "Features"}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options shared by all commands that measure a Fréchet distance; see their help texts."""

    extractor: str = option(
        "Feature network: inception (the distance is an FID), efficientnet-lite0 (offline), clip "
        "or dinov2.",
        default="inception",
        **_FEATURES,
    )
    protocol: str = option(
        "How images are resized and scaled: atc, pytorch-fid or torchmetrics.",
        default="atc",
        **_FEATURES,
    )
    weights: str | None = option(
        "The network's weight file.", default=None, when_none="the usual places", **_FEATURES
    )
    download_weights: bool = option("Fetch missing weights (96 MB).", default=False, **_FEATURES)
    allow_unknown_weights: bool = option(
        "Accept weights with another checksum.", default=False, **_FEATURES
    )
    precision: str = option(
        "Precision of the network: float32, or bfloat16 or float16, which are faster but give "
        "other features.",
        default="float32",
        **_FEATURES,
    )
    cache: str | None = option(
        "Folder of cached features.",
        default=None,
        when_none="$SD_TOKENMERGE_CACHE, else ~/.cache/sd-tokenmerge",
        **_FEATURES,
    )
    assume_protocol: str | None = option(
        "Protocol of the images behind an .npz file that does not record it.",
        default=None,
        **_FEATURES,
    )

    def __post_init__(self) -> None:
        """Check the types; names are checked by `find_extractor` and `find_protocol`.

        Raises:
            TypeError: an option is of the wrong type.
        """
        require_options(self)

    def extraction(self) -> dict[str, Any]:
        """Arguments of `extract_features`."""
        return {
            "extractor": self.extractor,
            "protocol": self.protocol,
            "weights": self.weights,
            "download_weights": self.download_weights,
            "allow_unknown_weights": self.allow_unknown_weights,
            "precision": self.precision,
            "cache": True if self.cache is None else self.cache,
        }
