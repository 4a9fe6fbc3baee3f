"""The sample pipeline's world: twelve ImageNet classes drawn by a procedural renderer.

`render(class_index, seed)` is a pure function; the training script and the demo's reference set
both come from it. Pictures hold long-range structure on purpose (mirror symmetry, rotational
symmetry, texture repeated across the picture), so that self-attention has work to do.
"""

from sample_world.objects import OBJECTS
from sample_world.render import render

CLASSES = tuple(sorted(OBJECTS))
"""ImageNet class indices of the world, ascending."""

__all__ = ["CLASSES", "OBJECTS", "render"]
