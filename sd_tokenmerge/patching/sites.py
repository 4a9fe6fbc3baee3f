"""The self-attentions of a denoiser; the only module that knows diffusers' model classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods.base import Grid


@dataclass(frozen=True, eq=False)
class Site:
    """A transformer block of a denoiser with its self-attention.

    Attributes:
        path: the block's name in the denoiser.
        level: how many times the image was halved before it gets here; 0 is the finest.
        heads: attention heads.
        channels: C of the block's tokens.
        transformer: the `Transformer2DModel` around the block, where height and width are known.
        block: the `BasicTransformerBlock`.
        attention: the block's self-attention.
    """

    path: str
    level: int
    heads: int
    channels: int
    transformer: Any = field(repr=False)
    block: Any = field(repr=False)
    attention: Any = field(repr=False)


def find_denoiser(model: object) -> nn.Module:
    """The uncompiled UNet of a pipeline, or `model` itself if it is a UNet or a ControlNet.

    Raises:
        TypeError: `model` is neither of them.
    """
    denoiser = getattr(model, "unet", model)
    if denoiser is None and model is not None:
        raise TypeError(f"`pipe` must have a UNet, got a {type(model).__name__} without one.")
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile(unet) wraps
    if not isinstance(denoiser, nn.Module) or not hasattr(denoiser, "down_blocks"):
        raise TypeError(
            "`pipe` must be a pipeline with a UNet as its `unet`, a UNet or a ControlNet, "
            f"got {type(model).__name__}."
        )
    return denoiser


def find_sites(denoiser: nn.Module) -> list[Site]:
    """All self-attentions over the image's tokens, in the order in which they run.

    Excludes temporal attention, GLIGEN and text-only blocks.

    Raises:
        ValueError: a transformer is outside the down, mid and up blocks, so its level is unknown.
    """
    sites = []
    for name, transformer in denoiser.named_modules():
        if not isinstance(transformer, Transformer2DModel) or not transformer.is_input_continuous:
            continue
        for index, block in enumerate(transformer.transformer_blocks):
            block = getattr(block, "_orig_mod", block)
            if isinstance(block, BasicTransformerBlock) and not block.only_cross_attention:
                sites.append(
                    Site(
                        path=f"{name}.transformer_blocks.{index}",
                        level=_level(name, len(denoiser.down_blocks)),  # type: ignore[arg-type]
                        heads=block.attn1.heads,
                        channels=block.attn1.query_dim,
                        transformer=transformer,
                        block=block,
                        attention=block.attn1,
                    )
                )
    return sorted(sites, key=lambda site: ["down", "mid", "up"].index(site.path.split("_")[0]))


def attention_holders(denoiser: nn.Module) -> list[str]:
    """The classes of the modules that a denoiser's attentions or their blocks are in, sorted."""
    holders = set()
    for name, module in denoiser.named_modules():
        if hasattr(module, "to_q"):
            holder, path = module, name
            while holder is module or isinstance(holder, nn.ModuleList) or "attn1" in dir(holder):
                path = path.rpartition(".")[0]
                holder = denoiser.get_submodule(path)
            holders.add(type(holder).__name__)
    return sorted(holders)


def _level(path: str, num_levels: int) -> int:
    place, *rest = (part for part in path.split(".") if part != "_orig_mod")
    if place == "down_blocks":
        return int(rest[0])
    if place == "mid_block":
        return num_levels - 1
    if place == "up_blocks":
        return num_levels - 1 - int(rest[0])
    raise ValueError(f"{path} must be in a down, mid or up block for its level to be known.")


def level_grid(level: int, latent_height: int, latent_width: int) -> Grid:
    """The token grid of a level: each level halves the latent's height and width, rounding up."""
    return Grid(-(-latent_height // 2**level), -(-latent_width // 2**level))


def native_latent_size(denoiser: nn.Module) -> tuple[int, int] | None:
    """Height and width of the latents that a denoiser was made for; None if its config has none."""
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def incompatibility(attention: Any, config: MergeConfig) -> str | None:
    """Why an attention can't be merged as `config` says, as a sentence; None if it can.

    With `merge="qkv"`, any processor works, as it is called on fewer tokens; only a bias on the
    logits is misread or ignored by many. Other forms replace the processor's one call of
    `scaled_dot_product_attention`.
    """
    processor = attention.processor
    cache_name = _cache_over_steps(attention)
    if cache_name is not None:
        return (
            f"the cache {cache_name!r} on a self-attention would replay merged tokens under "
            "another partition: remove one of the two."
        )
    if type(processor).__name__ == "CrossAttnStoreProcessor":
        return "self-attention guidance needs the attention of all tokens of this block."
    if config.merge != "qkv":
        is_supported = isinstance(processor, _CALL_SDPA)
    else:
        is_supported = not config.weights_keys or isinstance(processor, _TAKE_BIAS)
    if not is_supported:
        return (
            "only merge='qkv' without proportional attention works with the processor "
            f"{type(processor).__name__}: call unet.set_attn_processor(AttnProcessor2_0()), or "
            "use that form of merging."
        )
    return None


_CALL_SDPA = (AttnProcessor2_0, FusedAttnProcessor2_0, CustomDiffusionAttnProcessor2_0)
_TAKE_BIAS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)


def _cache_over_steps(attention: Any) -> str | None:
    """The name of a diffusers cache that keeps this attention's output from call to call, if any.

    Such a cache (pyramid attention broadcast, FasterCache, ...) works inside the merged attention.
    """
    registry = getattr(attention, "_diffusers_hook", None)
    if registry is not None:
        for name, hook in registry.hooks.items():
            if hook._is_stateful:
                return str(name)
    return None
