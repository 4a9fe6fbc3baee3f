from __future__ import annotations

import hashlib
import platform

import numpy as np
import pytest
import torch
from PIL import Image

from sd_tokenmerge.fid.preprocess import PROTOCOLS, find_protocol
from tests.reference.fid_preprocessing import bicubic, clean_rule, resize, triangle


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours, hard edges and noise; integer arithmetic only, so equal everywhere."""
    y, x = np.mgrid[:height, :width]
    red = x * 255 // max(width - 1, 1)
    green = ((x // 7 + y // 5) % 2) * 255
    blue = (x * 7919 + y * 104729 + x * y * 31) % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


SIZES = [(512, 512), (500, 375), (299, 299), (120, 90), (1, 1), (31, 700)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_atc_equals_the_clean_rule_bit_for_bit(width: int, height: int) -> None:
    image = picture(width, height)
    ours = PROTOCOLS["atc"].resize(image, 299)
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy(), clean_rule(image, 299))


def test_atc_has_not_changed() -> None:
    # clean_rule(picture(500, 375), 299) with Pillow 13.0; another value means that Pillow's filter,
    # and with it every FID, has changed
    pixels = PROTOCOLS["atc"].resize(picture(500, 375), 299).numpy()
    digest = hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
    if platform.machine() == "x86_64":  # fused multiply-adds change the last bit elsewhere
        assert digest == GOLDEN_SHA256
    assert pixels[:, 150, 150].tolist() == pytest.approx(GOLDEN_PIXEL, abs=1e-4)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (12, 9)])
def test_atc_is_the_antialiased_cubic_filter(width: int, height: int) -> None:
    image = picture(width, height)
    slow = resize(image, 24, bicubic, 2.0, stretch=True).clip(0, 255)
    assert np.abs(PROTOCOLS["atc"].resize(image, 24).numpy() - slow).max() < 1e-3


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (12, 9)])
def test_torchmetrics_is_the_antialiased_triangle_filter(width: int, height: int) -> None:
    image = picture(width, height)
    slow = resize(image, 24, triangle, 1.0, stretch=True)
    assert np.abs(PROTOCOLS["torchmetrics"].resize(image, 24).numpy() - slow).max() < 1e-3


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (12, 9)])
def test_pytorch_fid_is_the_plain_triangle_filter(width: int, height: int) -> None:
    image = picture(width, height)
    slow = resize(image, 24, triangle, 1.0, stretch=False)
    assert np.abs(PROTOCOLS["pytorch-fid"].resize(image, 24).numpy() - slow).max() < 1e-3


def test_network_inputs_are_those_of_the_packages() -> None:
    image = picture(500, 375)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for name in ("atc", "torchmetrics"):
        protocol = PROTOCOLS[name]
        resized = protocol.resize(image, 299)
        assert torch.equal(protocol.normalize(resized), (resized - 128) / 128)
    # pytorch-fid: ToTensor, interpolate in the network, then 2x - 1
    unit = pixels.to(torch.float32).div(255)[None]
    interpolated = torch.nn.functional.interpolate(
        unit, size=(299, 299), mode="bilinear", align_corners=False
    )
    protocol = PROTOCOLS["pytorch-fid"]
    ours = protocol.normalize(protocol.resize(image, 299))
    assert (ours - (2 * interpolated[0] - 1)).abs().max() <= 3e-7


def test_torchmetrics_input_is_the_metrics_own() -> None:
    # torchmetrics resizes uint8 batches inside NoTrainInceptionV3: interpolate(antialias=True)
    image = picture(500, 375)
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float)
    theirs = torch.nn.functional.interpolate(
        batch, size=(299, 299), mode="bilinear", align_corners=False, antialias=True
    )
    assert torch.equal(PROTOCOLS["torchmetrics"].resize(image, 299), theirs[0])


def test_protocols_differ_and_stay_in_range() -> None:
    image = picture(512, 512)
    resized = {name: protocol.resize(image, 299) for name, protocol in PROTOCOLS.items()}
    for pixels in resized.values():
        assert pixels.shape == (3, 299, 299)
        assert float(pixels.min()) >= 0
        assert float(pixels.max()) <= 255.001
    assert (resized["atc"] - resized["torchmetrics"]).abs().max() > 5
    assert (resized["atc"] - resized["pytorch-fid"]).abs().max() > 5


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of atc, pytorch-fid, torchmetrics, got 'x'"):
        find_protocol("x")


GOLDEN_SHA256 = "f17c992e2b3ac6a1b468e28278ef49c7cb9e7e89a57a3f9fc747bb8ae2b1c161"
GOLDEN_PIXEL = [127.83575, 69.44245, 135.37444]
