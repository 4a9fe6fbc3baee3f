"""How an image becomes the network's input: resizing and pixel scaling, by protocol.

FID numbers of the same images differ by several per cent between these protocols, so every result
names its own. Each resizes to a square without cropping or keeping the aspect ratio.

- `atc`: clean-fid's "clean" mode (Parmar et al., CVPR 2022), which ATC reports. Pillow's bicubic
  filter (antialiased) on float channels, clipped to [0, 255], not rounded. Bit for bit clean-fid's.
- `pytorch-fid`: bilinear without antialiasing on [0, 1], as in pytorch-fid's network. The scaling
  back to [0, 255] changes the network's input by at most 3e-7.
- `torchmetrics`: antialiased bilinear on the 8-bit pixels, as in torchmetrics since 1.8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Protocol:
    """A named way of preparing images.

    Attributes:
        name: as given on the command line and printed with every result.
        resize: `(image, size) -> [3, size, size]` float32 in [0, 255] from an 8-bit RGB image.
        normalize: pixels in [0, 255] to the FID Inception network's input. Other networks have
            their own scaling, which does not depend on the protocol.
    """

    name: str
    resize: Callable[[Image.Image, int], Tensor]
    normalize: Callable[[Tensor], Tensor]


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def clean_resize(image: Image.Image, size: int) -> Tensor:
    """Bicubic on each float channel, clipped but not rounded (clean-fid's "clean" mode)."""
    channels = [
        np.asarray(channel.convert("F").resize((size, size), Image.Resampling.BICUBIC))
        for channel in image.split()
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def bilinear_resize(image: Image.Image, size: int) -> Tensor:
    """Bilinear without antialiasing (pytorch-fid)."""
    unit = _pixels(image).to(torch.float32).div(255)[None]
    return F.interpolate(unit, (size, size), mode="bilinear", align_corners=False)[0] * 255


def antialiased_resize(image: Image.Image, size: int) -> Tensor:
    """Bilinear with antialiasing (torchmetrics since 1.8)."""
    pixels = _pixels(image).to(torch.float32)[None]
    return F.interpolate(
        pixels, (size, size), mode="bilinear", align_corners=False, antialias=True
    )[0]


def centre_at_128(pixels: Tensor) -> Tensor:
    """The TensorFlow graph's scaling: `(x - 128) / 128`."""
    return (pixels - 128) / 128


def unit_symmetric(pixels: Tensor) -> Tensor:
    """pytorch-fid's scaling: `2 (x / 255) - 1`."""
    return 2 * (pixels / 255) - 1


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("atc", clean_resize, centre_at_128),
        Protocol("pytorch-fid", bilinear_resize, unit_symmetric),
        Protocol("torchmetrics", antialiased_resize, centre_at_128),
    )
}


def find_protocol(name: str) -> Protocol:
    """Look a protocol up by name.

    Raises:
        ValueError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {name!r}.")
    return PROTOCOLS[name]
