"""Attention processors that a pipeline installs when it is called, after `apply_patch` has run."""

from __future__ import annotations

import re
import sys
from typing import Any

_PROCESSORS = {
    "LEditsPPPipelineStableDiffusion": "AttnProcessor",
    "LEditsPPPipelineStableDiffusionXL": "AttnProcessor",
    "StableDiffusionAttendAndExcitePipeline": "AttendExciteAttnProcessor",
    "StableDiffusionPix2PixZeroPipeline": "Pix2PixZeroAttnProcessor",
    "StableDiffusionSAGPipeline": "CrossAttnStoreProcessor",
    "TextToVideoZeroPipeline": "CrossFrameAttnProcessor2_0",
    "TextToVideoZeroSDXLPipeline": "CrossFrameAttnProcessor2_0",
}
"""By pipeline class: the processor of its self-attentions, a name in the pipeline's module."""

_SELF_ATTENTION_GUIDANCE = "mid_block.attentions.0.transformer_blocks.0"
"""The only block where the pipeline of self-attention guidance (SAG) installs its processor."""


def installed_processors(pipe: object, path: str) -> list[type]:
    """The classes of the processors that a pipeline's call installs in one self-attention.

    Args:
        pipe: a pipeline, or a model, which installs none.
        path: the name of the attention's block in the UNet.
    """
    for base in type(pipe).__mro__:
        name = _PROCESSORS.get(base.__name__)
        if name is not None and (
            name != "CrossAttnStoreProcessor" or path == _SELF_ATTENTION_GUIDANCE
        ):
            return [getattr(sys.modules[base.__module__], name)]
    perturbed: Any = getattr(pipe, "_pag_attn_processors", None)
    if perturbed is not None and _is_perturbed(pipe, f"{path}.attn1"):
        return [type(processor) for processor in perturbed]
    return []


def _is_perturbed(pipe: Any, name: str) -> bool:
    """Whether perturbed-attention guidance (PAG) applies to the attention of that name."""
    return any(re.search(layer, name) is not None for layer in pipe.pag_applied_layers)
