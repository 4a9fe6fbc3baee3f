"""The self-attentions of a denoiser; the only module that knows diffusers' model classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.patching.families import FAMILIES, Family, Order, find_family

_TAKE_BIAS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)


@dataclass(frozen=True, eq=False)
class Site:
    """A self-attention over image tokens in a transformer block of a denoiser.

    Attributes:
        path: the block's name in the denoiser; with the attention's name if the block has two.
        level: how many times the image was halved before it gets here; 0 is the finest.
        heads: attention heads.
        channels: C of the block's tokens.
        transformer: the module around the block, where height and width are known.
        block: the transformer block.
        attention: the self-attention.
        order: of image and text tokens in its sequence.
        processors: names of the processors that all forms of merging work with.
        merges_input: whether `merge="qkv"` merges the attention's input; see `Attentions`.
    """

    path: str
    level: int
    heads: int
    channels: int
    transformer: Any = field(repr=False)
    block: Any = field(repr=False)
    attention: Any = field(repr=False)
    order: Order = "image"
    processors: tuple[str, ...] = (
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "CustomDiffusionAttnProcessor2_0",
    )
    merges_input: bool = True


def find_denoiser(model: object) -> nn.Module:
    """The uncompiled UNet or transformer of a pipeline, or `model` itself if it is one.

    Raises:
        TypeError: `model` is no denoiser and has none, has two, or its class is not supported.
    """
    if getattr(model, "transformer_2", None) is not None:
        raise TypeError(
            f"`pipe` must have one denoiser, got a {type(model).__name__} with two: patch its "
            "`transformer` and its `transformer_2`."
        )
    slots = [name for name in ("unet", "transformer") if hasattr(model, name)]
    if slots and all(getattr(model, name) is None for name in slots):
        raise TypeError(
            f"`pipe` must have a denoiser, got a {type(model).__name__} without its {slots[0]}."
        )
    denoiser: Any = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile(unet) wraps
    is_supported = isinstance(denoiser, nn.Module) and (
        hasattr(denoiser, "down_blocks") or find_family(denoiser) is not None
    )
    if not is_supported:
        found = "" if denoiser is model else f" with a {type(denoiser).__name__}"
        raise TypeError(
            "`pipe` must be a pipeline with a UNet or a supported transformer, or such a model "
            f"itself ({', '.join(FAMILIES)}), got a {type(model).__name__}{found}."
        )
    return denoiser  # type: ignore[no-any-return]


def find_sites(denoiser: nn.Module) -> list[Site]:
    """All self-attentions over the image's tokens, in the order in which they run.

    Excludes temporal attention, GLIGEN and text-only blocks.

    Raises:
        ValueError: a transformer is outside the down, mid and up blocks, so its level is unknown.
    """
    family = find_family(denoiser)
    return _in_unet(denoiser) if family is None else _in_transformer(denoiser, family)


def _in_transformer(denoiser: Any, family: Family) -> list[Site]:
    sites = []
    for blocks in dict.fromkeys(attentions.blocks for attentions in family.attentions):
        rows = [row for row in family.attentions if row.blocks == blocks]
        for index, block in enumerate(getattr(denoiser, blocks)):
            block = getattr(block, "_orig_mod", block)
            for row in rows:
                attention = getattr(block, row.attention, None)
                if attention is not None:
                    path = f"{blocks}.{index}" + (f".{row.attention}" if len(rows) > 1 else "")
                    sites.append(
                        Site(
                            path=path,
                            level=0,
                            heads=attention.heads,
                            channels=attention.inner_dim,
                            transformer=denoiser,
                            block=block,
                            attention=attention,
                            order=row.order,
                            processors=(row.processor, f"Fused{row.processor}"),
                            merges_input=row.merges_input,
                        )
                    )
    return sites


def _in_unet(denoiser: nn.Module) -> list[Site]:
    sites = []
    for name, transformer in denoiser.named_modules():
        is_spatial = isinstance(transformer, TransformerSpatioTemporalModel) or (
            isinstance(transformer, Transformer2DModel) and transformer.is_input_continuous
        )
        if not is_spatial:
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


def level_grid(level: int, finest: Grid) -> Grid:
    """The token grid of a level: each level halves the height and width of level 0, rounding up."""
    return Grid(-(-finest.height // 2**level), -(-finest.width // 2**level))


def latents_per_token(denoiser: Any) -> int:
    """Latents, in height and width, that make one token of level 0."""
    family = find_family(denoiser)
    if family is None:
        return 1
    size: Any = family.patch_size or denoiser.config.patch_size
    return int(size[-1] if isinstance(size, tuple | list) else size)


def native_grid(denoiser: nn.Module) -> Grid | None:
    """The grid of level 0 that a denoiser was made for; None if its config has none."""
    latents = native_latent_size(denoiser)
    if latents is None:
        return None
    patch = latents_per_token(denoiser)
    return Grid(latents[0] // patch, latents[1] // patch)


def native_latent_size(denoiser: nn.Module) -> tuple[int, int] | None:
    """Height and width of the latents that a denoiser was made for; None if its config has none."""
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def incompatibility(
    attention: Any,
    config: MergeConfig,
    processors: tuple[str, ...],
    merges_input: bool,
    installed: type | None = None,
) -> str | None:
    """Why an attention can't be merged as `config` says, as a sentence; None if it can.

    If `merge="qkv"` merges its input, any processor works, as it is called on fewer tokens; only a
    bias on the logits is misread or ignored by many. Otherwise the processor's one call of
    `scaled_dot_product_attention` is replaced.

    Args:
        attention: the attention.
        config: how tokens are merged.
        processors: of its `Site`.
        merges_input: of its `Site`.
        installed: the class of a processor that the pipeline will install; None: the attention's.
    """
    processor = attention.processor
    kind = type(processor) if installed is None else installed
    cache_name = _cache_over_steps(attention)
    if cache_name is not None:
        return (
            f"the cache {cache_name!r} on a self-attention would replay merged tokens under "
            "another partition: remove one of the two."
        )
    names = {base.__name__ for base in kind.__mro__}
    if "CrossAttnStoreProcessor" in names:
        return "self-attention guidance needs the attention of all tokens of this block."
    backend = getattr(processor, "_attention_backend", None)
    backend = getattr(backend, "value", backend)
    if backend not in (None, "native"):
        return (
            f"the attention backend {backend} can't be replaced: call "
            "set_attention_backend('native')."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism splits the tokens that are merged."
    if not merges_input:
        if names.isdisjoint(processors):
            return (
                f"its attentions must have the processor {processors[0]}, got "
                f"{type(processor).__name__}."
            )
    elif config.merge != "qkv" or config.weights_keys:
        takes_bias = not names.isdisjoint(_TAKE_BIAS)
        takes_other_forms = not names.isdisjoint(processors)
        if not (takes_bias if config.merge == "qkv" else takes_other_forms):
            if takes_other_forms:
                fact, choice = "merge='qkv' with proportional attention does not work", "another"
            else:
                form = "merge='qkv'" + ("" if takes_bias else " without proportional attention")
                fact, choice = f"only {form} works", "that"
            remedy = (
                ": call unet.set_attn_processor(AttnProcessor2_0()), or use "
                f"{choice} form of merging."
                if installed is None
                else ", which this pipeline installs when it is called."
            )
            return f"{fact} with the processor {kind.__name__}{remedy}"
    return None


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
