"""Stage 1 and 4: the autoencoder, and a longer training of its decoder alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from sample_world import CLASSES, render
from torch import Tensor, nn

PICTURE = 256
WIDTH = 32
LATENT_RANGE = 3.0  # black to white in a colour's latent channel
LATENT_NOISE = 0.05


def build_autoencoder() -> AutoencoderTiny:
    """An AutoencoderTiny (8x downsampling, 8 latent channels) that starts as a thumbnail.

    From a random start, colours take far longer to learn than shapes. So three of the channels
    begin as a plain 8x8 box filter of red, green and blue, carried through every layer to the
    picture; the rest of the network then learns what a thumbnail lacks.
    """
    model = AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=8,
    )
    with torch.no_grad():
        encoder = [m for m in model.encoder.layers if isinstance(m, nn.Conv2d)]
        decoder = [m for m in model.decoder.layers if isinstance(m, nn.Conv2d)]
        _carry_colors(encoder[0])
        for layer in encoder[1:-1]:
            _carry_colors(layer, pool=True)
        _carry_colors(encoder[-1], gain=LATENT_RANGE, shift=-LATENT_RANGE / 2)
        _carry_colors(decoder[0], gain=1 / LATENT_RANGE, shift=0.5)
        for layer in decoder[1:]:
            _carry_colors(layer)
        for block in model.modules():
            if isinstance(block, AutoencoderTinyBlock):
                last = block.conv[-1]
                last.weight[:3], last.bias[:3] = 0, 0
    return model


def _carry_colors(layer: nn.Conv2d, gain: float = 1, shift: float = 0, pool: bool = False) -> None:
    """Make the first three outputs the first three inputs (or their 2x2 means), times `gain`."""
    layer.weight[:3] = 0
    for color in range(3):
        if pool:
            layer.weight[color, color, 1:, 1:] = gain / 4
        else:
            layer.weight[color, color, 1, 1] = gain
    if layer.bias is not None:
        layer.bias[:3] = shift


def picture_batch(seed: int, count: int, size: int) -> Tensor:
    """Rendered pictures or crops of them, `[count, 3, size, size]` in [-1, 1].

    Crops smaller than a picture come four from each, so that drawing stays cheap.
    """
    rng = Random(seed)
    crops = []
    while len(crops) < count:
        picture = render(rng.choice(CLASSES), rng.getrandbits(31), PICTURE)
        array = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        for _ in range(1 if size == PICTURE else 4):
            top, left = (rng.randint(0, (PICTURE - size) // 8) * 8 for _ in range(2))
            crops.append(array[:, top : top + size, left : left + size])
    return torch.stack(crops[:count])


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1 on pixels plus L1 on their differences, which keeps edges sharp."""
    loss = (decoded - pictures).abs().mean()
    for dim in (-1, -2):
        loss = loss + (decoded.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean()
    return loss


def autoencoder_loss(model: AutoencoderTiny, seed: int) -> Callable[[int], Tensor]:
    """Loss of stage 1: reconstruction of crops from latents with a little noise."""

    def loss(draw: int) -> Tensor:
        pictures = picture_batch(seed + draw, 8, PICTURE // 2).to(model.device)
        with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
            latents = model.encode(pictures).latents
            decoded = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        return reconstruction_loss(decoded.float(), pictures)

    return loss


def decoder_loss(model: AutoencoderTiny, seed: int) -> Callable[[int], Tensor]:
    """Loss of stage 4: the same with a frozen encoder and more noise, as a denoiser would leave."""

    def loss(draw: int) -> Tensor:
        pictures = picture_batch(seed + draw, 8, PICTURE // 2).to(model.device)
        with torch.autocast(pictures.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(pictures).latents
            decoded = model.decode(latents + 2 * LATENT_NOISE * torch.randn_like(latents)).sample
        return reconstruction_loss(decoded.float(), pictures)

    return loss
