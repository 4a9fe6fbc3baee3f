"""A tiny extractor of one's own: what a plugged-in network looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sd_tokenmerge.fid.extractors import EXTRACTORS, Extractor

NUM_FEATURES = 12


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(NUM_FEATURES, 3, 5, 5, generator=generator) / 9
        self.kernel = nn.Parameter(kernel, requires_grad=False)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape[0])
        return torch.conv2d(x, self.kernel, stride=2).relu().mean((2, 3))


def toy_extractor(network: nn.Module | None = None) -> Extractor:
    network = network or ToyNetwork()
    return Extractor(
        name="toy",
        image_size=32,
        num_features=NUM_FEATURES,
        weights_sha256="0" * 64,
        normalize=lambda pixels: pixels / 128 - 1,
        load=lambda: network,
    )


def use_toy_extractor(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Make it known as "toy", and cache features below `root` instead of the user's cache."""
    patch.setenv("SD_TOKENMERGE_CACHE", str(root / "cache"))
    patch.setitem(EXTRACTORS, "toy", lambda request: toy_extractor())
