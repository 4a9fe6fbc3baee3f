"""The node, in ComfyUI's V3 schema."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io

from sd_tokenmerge.config import PRESETS

from .override import FORMS, MergedAttention

_KEY = "sd_tokenmerge"
_PRESET = PRESETS["balanced"]


class TokenMerge(io.ComfyNode):
    """Merges image tokens in the self-attentions of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, as the arguments of `MergedAttention`, and the output."""
        return io.Schema(
            node_id="SDTokenMerge",
            display_name="Token Merging (sd_tokenmerge)",
            category="model_patches",
            description="Attends to merged keys and values of the image tokens.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "method", default=_PRESET.method, tooltip="Such as tome-sd:stride=4 or atc"
                ),
                io.Float.Input(
                    "keep_rate", default=_PRESET.keep_rate.rate, min=0.01, max=1.0, step=0.0005
                ),
                io.Combo.Input("merge", options=list(FORMS), default=_PRESET.merge),
                io.Int.Input(
                    "refresh_every",
                    default=_PRESET.refresh_every,
                    min=1,
                    max=1000,
                    tooltip="Calls of the model that share clusters.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=1024,
                    min=1,
                    max=2**20,
                    tooltip="Attention among fewer image tokens is not merged.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **options: Any) -> io.NodeOutput:
        """A clone of the model with merged attention."""
        model = model.clone()
        transformer_options = model.model_options["transformer_options"]
        previous = transformer_options.get("optimized_attention_override")
        attention = MergedAttention(**options, previous=previous)
        transformer_options["optimized_attention_override"] = attention
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, attention.sample)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, attention.apply_model)
        return io.NodeOutput(model)


class TokenMergeExtension(ComfyExtension):
    """The nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [TokenMerge]
