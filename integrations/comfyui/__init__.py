"""Token merging with sd_tokenmerge, as a custom node of ComfyUI."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension that ComfyUI loads its nodes from."""
    from .nodes import TokenMergeExtension  # here, so that tests import `override` without ComfyUI

    return TokenMergeExtension()
