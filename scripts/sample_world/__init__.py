"""The sample pipeline's world: twelve ImageNet classes drawn by a procedural renderer.

`render(class_index, seed)` is a pure function; the training script and the demo's reference set
both come from it. Pictures hold long-range structure on purpose (mirror symmetry, rotational
symmetry, texture repeated across the picture), so that self-attention has work to do.
"""

from sample_world.render import render
from sample_world.sets import CLASSES, REFERENCE_SEED, Picture, rendered, save

__all__ = ["CLASSES", "REFERENCE_SEED", "Picture", "render", "rendered", "save"]
