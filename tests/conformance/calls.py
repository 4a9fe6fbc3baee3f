"""Arguments of any pipeline's call, chosen by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.conformance.components import LATENT, PIXELS, WIDTH


def picture(size: int = PIXELS, shift: int = 0) -> Image.Image:
    """A picture with edges and gradients."""
    row, column = np.mgrid[:size, :size]
    red = (row * 255) // size
    green = ((column + shift) * 255 // size) % 256
    blue = np.where((row + column) % 16 < 8, 255, 0)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def mask() -> Image.Image:
    """White in the middle."""
    values = np.zeros((PIXELS, PIXELS), np.uint8)
    values[8:24, 8:24] = 255
    return Image.fromarray(values)


def _frames() -> list[Image.Image]:
    return [picture(), picture(shift=4)]


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "condtioning_image": picture,  # sic, of BlipDiffusionControlNetPipeline
    "conditioning_frames": _frames,
    "control_image": picture,
    "decode_chunk_size": lambda: 2,
    "depth_map": lambda: torch.linspace(0, 1, LATENT**2).view(1, LATENT, LATENT),
    "example_image": picture,
    "generator": lambda: torch.Generator().manual_seed(0),
    "image": picture,
    "mask_image": mask,
    "num_frames": lambda: 2,
    "num_inference_steps": lambda: 2,
    "output_type": lambda: "np",
    "processing_resolution": lambda: PIXELS,
    "prompt": lambda: "a dog",
    "reference_image": picture,
    "source_subject_category": lambda: ["dog"],
    "strength": lambda: 0.8,
    "target_subject_category": lambda: ["dog"],
    "video": _frames,
    "video_length": lambda: 2,
}

_BLIP = {"prompt": ["a dog"], "height": PIXELS, "width": PIXELS, "prompt_reps": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "BlipDiffusionControlNetPipeline": _BLIP,
    "BlipDiffusionPipeline": _BLIP,
    "CycleDiffusionPipeline": {"source_prompt": "a cat", "eta": 0.1},
    "I2VGenXLPipeline": {"clip_skip": None, "height": PIXELS, "width": PIXELS},
    "LDMTextToImagePipeline": {"height": 8 * LATENT, "width": 8 * LATENT},
    "StableDiffusionAttendAndExcitePipeline": {"token_indices": [1], "max_iter_to_alter": 1},
    "StableDiffusionDiffEditPipeline": {
        "mask_image": torch.ones(1, LATENT, LATENT),
        "image_latents": torch.ones(1, 1, 4, LATENT, LATENT),
    },
    "StableDiffusionGLIGENPipeline": {
        "gligen_phrases": ["a dog"],
        "gligen_boxes": [[0.2, 0.2, 0.8, 0.8]],
    },
    "StableDiffusionPanoramaPipeline": {"height": PIXELS, "width": PIXELS},
    "StableDiffusionPix2PixZeroPipeline": {
        "source_embeds": torch.linspace(-1, 1, 77 * WIDTH).view(1, 77, WIDTH),
        "target_embeds": torch.linspace(1, -1, 77 * WIDTH).view(1, 77, WIDTH),
    },
    "StableDiffusionUpscalePipeline": {"image": picture(LATENT)},
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": {"control_mode": [0]},
    "StableDiffusionXLControlNetUnionInpaintPipeline": {"control_mode": [0]},
    "StableDiffusionXLControlNetUnionPipeline": {"control_mode": [0]},
    "StableVideoDiffusionPipeline": {"height": PIXELS, "width": PIXELS},
    "TextToVideoZeroPipeline": {"t0": 0, "t1": 1},
    "TextToVideoZeroSDXLPipeline": {"t0": 0, "t1": 1},
}

_EMBEDDING = torch.linspace(-1, 1, WIDTH).view(1, WIDTH)
_SOUND = {
    "prompt": None,
    "audio_length_in_s": 0.02,
    "prompt_embeds": _EMBEDDING,
    "negative_prompt_embeds": -_EMBEDDING,
}
_TEXTS = {
    f"{sign}{name}": (-1 if sign else 1) * _EMBEDDING.expand(1, 4, -1)
    for sign in ("", "negative_")
    for name in ("prompt_embeds", "generated_prompt_embeds")
}
_MASKS = {
    name: torch.ones(1, 4, dtype=torch.int64)
    for name in ("attention_mask", "negative_attention_mask")
}
CHANGES |= {
    "AudioLDMPipeline": _SOUND,
    "AudioLDM2Pipeline": {**_SOUND, **_TEXTS, **_MASKS},
    "MusicLDMPipeline": _SOUND,
    "StableDiffusionGLIGENTextImagePipeline": {
        **CHANGES["StableDiffusionGLIGENPipeline"],
        "gligen_images": [picture()],
    },
}

_KOLORS = {
    "prompt": None,
    "prompt_embeds": torch.linspace(-1, 1, 256 * 2 * WIDTH).view(1, 256, 2 * WIDTH),
    "pooled_prompt_embeds": torch.linspace(-1, 1, WIDTH).view(1, WIDTH),
    "negative_prompt_embeds": torch.zeros(1, 256, 2 * WIDTH),
    "negative_pooled_prompt_embeds": torch.zeros(1, WIDTH),
}


@torch.no_grad()
def call(pipe: Any) -> list[np.ndarray]:
    """The arrays that one call of a pipeline returns, the same for every call."""
    name = type(pipe).__name__
    torch.manual_seed(0)
    if name.startswith("LEditsPP"):
        pipe.invert(picture(), source_prompt="a cat", num_inversion_steps=4, skip=0.2)
        given = {"editing_prompt": ["a dog"], "output_type": "np", "use_intersect_mask": False}
    else:
        given = {key: ARGUMENTS[key]() for key in _parameters(pipe) if key in ARGUMENTS}
        given |= CHANGES.get(name, {})
        if name.startswith("Kolors"):
            given |= _KOLORS
    return list(_arrays(pipe(**given)))


def _parameters(pipe: Any) -> list[str]:
    return list(inspect.signature(type(pipe).__call__).parameters)


def _arrays(output: Any) -> Any:
    """All arrays in a pipeline's output."""
    if isinstance(output, torch.Tensor):
        yield output.float().numpy()
    elif isinstance(output, np.ndarray) and output.dtype != object:
        yield output.astype(np.float32)
    elif isinstance(output, Image.Image):
        yield np.asarray(output).astype(np.float32)
    elif isinstance(output, dict):
        for value in output.values():
            yield from _arrays(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _arrays(value)
