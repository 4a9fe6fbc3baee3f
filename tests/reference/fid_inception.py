"""The FID Inception-v3 from its state dict, written as a list of paths, with naive layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def unit(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Convolution, batch norm by its formula, ReLU; odd kernels of stride 1 keep the size."""
    weight = state[f"{name}.conv.weight"].double()
    same = stride == 1 and not name.startswith(("Conv2d_1a", "Conv2d_2a", "Conv2d_4a"))
    padding = tuple(side // 2 for side in weight.shape[2:]) if same else 0
    x = F.conv2d(x, weight, stride=stride, padding=padding)
    mean, variance, gamma, beta = (
        state[f"{name}.bn.{part}"].double()[:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (variance + 0.001).sqrt() * gamma + beta).clamp_min(0)


def path(state: State, block: str, x: Tensor, *names: str, stride: int = 1) -> Tensor:
    for index, name in enumerate(names):
        last = index == len(names) - 1
        x = unit(state, f"{block}.{name}", x, stride if last else 1)
    return x


def average_3x3(x: Tensor) -> Tensor:
    """Mean over the neighbours that exist."""
    ones = torch.ones_like(x[:, :1])
    kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    count = F.conv2d(ones, kernel, padding=1)
    channels = x.shape[1]
    sums = F.conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
    return sums / count


def maximum_3x3(x: Tensor, stride: int) -> Tensor:
    if stride == 1:
        x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    return x.unfold(2, 3, stride).unfold(3, 3, stride).amax((-1, -2))


def block_a(s: State, b: str, x: Tensor) -> Tensor:
    return torch.cat(
        [
            path(s, b, x, "branch1x1"),
            path(s, b, x, "branch5x5_1", "branch5x5_2"),
            path(s, b, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            path(s, b, average_3x3(x), "branch_pool"),
        ],
        1,
    )


def block_c(s: State, b: str, x: Tensor) -> Tensor:
    return torch.cat(
        [
            path(s, b, x, "branch1x1"),
            path(s, b, x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
            path(s, b, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            path(s, b, average_3x3(x), "branch_pool"),
        ],
        1,
    )


def block_e(s: State, b: str, x: Tensor, pooled: Tensor) -> Tensor:
    single = path(s, b, x, "branch3x3_1")
    double = path(s, b, x, "branch3x3dbl_1", "branch3x3dbl_2")
    return torch.cat(
        [
            path(s, b, x, "branch1x1"),
            path(s, b, single, "branch3x3_2a"),
            path(s, b, single, "branch3x3_2b"),
            path(s, b, double, "branch3x3dbl_3a"),
            path(s, b, double, "branch3x3dbl_3b"),
            path(s, b, pooled, "branch_pool"),
        ],
        1,
    )


def slow_inception(state: State, x: Tensor) -> Tensor:
    """`[B, 3, 299, 299]` in [-1, 1] to `[B, 2048]` float64."""
    x = unit(state, "Conv2d_1a_3x3", x.double(), stride=2)
    x = unit(state, "Conv2d_2a_3x3", x)
    x = unit(state, "Conv2d_2b_3x3", x)
    x = maximum_3x3(x, 2)
    x = unit(state, "Conv2d_3b_1x1", x)
    x = unit(state, "Conv2d_4a_3x3", x)
    x = maximum_3x3(x, 2)
    for name in "bcd":
        x = block_a(state, f"Mixed_5{name}", x)
    names = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    x = torch.cat(
        [
            path(state, "Mixed_6a", x, "branch3x3", stride=2),
            path(state, "Mixed_6a", x, *names, stride=2),
            maximum_3x3(x, 2),
        ],
        1,
    )
    for name in "bcde":
        x = block_c(state, f"Mixed_6{name}", x)
    x = torch.cat(
        [
            path(state, "Mixed_7a", x, "branch3x3_1", "branch3x3_2", stride=2),
            path(state, "Mixed_7a", x, *(f"branch7x7x3_{i}" for i in range(1, 5)), stride=2),
            maximum_3x3(x, 2),
        ],
        1,
    )
    x = block_e(state, "Mixed_7b", x, average_3x3(x))
    x = block_e(state, "Mixed_7c", x, maximum_3x3(x, 1))
    return x.mean((2, 3))


def random_state(seed: int) -> State:
    """Parameters of the public files' names and shapes, drawn so that activations stay near one."""
    from sd_tokenmerge.fid.inception import FIDInceptionV3

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in FIDInceptionV3().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("conv.weight"):
            state[name] = noise * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + 0.3 * noise.abs()
        else:
            state[name] = 0.1 * noise
    return state
