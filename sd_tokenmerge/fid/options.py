"""How features are extracted, as options of commands. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options that every command with a Fréchet distance has; see `extract_features`.

    Attributes:
        extractor: name of the network.
        protocol: how images are resized and scaled.
        weights: the network's weight file; None: the usual places.
        download_weights: whether missing weights are fetched.
        allow_unknown_weights: whether weights with another checksum are accepted.
        precision: of the network's arithmetic.
        cache: folder of cached features; None: the user's.
        assume_protocol: how the images of an `.npz` file without a protocol were prepared.
    """

    extractor: str = "inception"
    protocol: str = "atc"
    weights: str | None = None
    download_weights: bool = False
    allow_unknown_weights: bool = False
    precision: str = "float32"
    cache: str | None = None
    assume_protocol: str | None = None
