"""Diffusers' transformers: which attentions they have, and where image tokens lie in a sequence.

A row per model class. Classes are named, not imported: not every version of diffusers has all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sd_tokenmerge.methods.base import Grid

ReadGrid = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Grid]
"""The token grid, from the model and its arguments."""
Order = Literal["image", "image-text", "text-image", "text-image-padding"]
"""What an attention's sequence consists of. With `"text-image-padding"`, shorter texts of a batch
are followed by the image at once, and the mask excludes the padding at the end of the sequence."""


@dataclass(frozen=True)
class Attentions:
    """The self-attentions over image tokens in one list of blocks.

    Attributes:
        blocks: the list's name in the model.
        attention: the attention's name in each block; blocks without it are passed over.
        order: of its tokens.
        processor: the class of its default processor. Besides it, only its fused variant is
            supported: the same name after "Fused".
        merges_input: whether `merge="qkv"` merges the attention's input, as in a UNet; otherwise it
            merges queries, keys and values, after norms and rotary embedding.
    """

    blocks: str
    attention: str
    order: Order
    processor: str
    merges_input: bool = False


class Clock(NamedTuple):
    """Relates a model's timesteps to its scheduler's: `scale` times the model's, plus `offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def to_scheduler(self, timestep: float) -> float:
        """The scheduler's timestep, up to rounding."""
        return self.scale * timestep + self.offset

    def from_scheduler(self, timesteps: Tensor) -> Tensor:
        """The inverse, for the timesteps of a generation."""
        return (timesteps - self.offset) / self.scale


_SAME = Clock()
_NOISE_AT_ONE = Clock(1000.0)
_NOISE_AT_ZERO = Clock(-1000.0, 1000.0)


@dataclass(frozen=True)
class Family:
    """A model class.

    Attributes:
        attentions: in the order in which they run.
        grid: reads the token grid of a call.
        timestep: position of `timestep` among the arguments of `forward`.
        clock: of the model's timesteps.
        patch_size: latents per token, in height and width; None: that of the model's configuration.
        makes_videos: whether the tokens are those of several frames.
    """

    attentions: tuple[Attentions, ...]
    grid: ReadGrid
    timestep: int
    clock: Clock = _SAME
    patch_size: int | None = None
    makes_videos: bool = False


def find_family(denoiser: nn.Module) -> Family | None:
    """The row of a transformer; None for any other model."""
    for kind in type(denoiser).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return None


def _of_image(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents `[B, C, H, W]`, divided into patches."""
    *_, height, width = _argument(args, kwargs, 0, "hidden_states").shape
    patch = model.config.patch_size
    return Grid(height // patch, width // patch)


def _of_video(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents `[B, C, F, H, W]`, divided into patches (frames, height, width)."""
    *_, frames, height, width = _argument(args, kwargs, 0, "hidden_states").shape
    patch = model.config.patch_size
    return Grid(height // patch[1], width // patch[2], frames // patch[0])


def _of_frames_first(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Latents `[B, F, C, H, W]`, divided into patches."""
    _, frames, _, height, width = _argument(args, kwargs, 0, "hidden_states").shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return Grid(height // patch, width // patch, frames // patch_t)


def _of_positions(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int = 4
) -> Grid:
    """Packed tokens with positions (image, row, column, ...), `[N, 3]` or `[B, N, 4]`."""
    positions: Tensor = _argument(args, kwargs, place, "img_ids")
    version = None if positions.is_inference() else positions._version
    if version is None or positions not in _GRIDS or _GRIDS[positions][0] != version:
        height, width = (positions[..., 1:3].flatten(0, -2).amax(0) + 1).tolist()
        _GRIDS[positions] = (version, Grid(int(height), int(width)))
    return _require_filled(_GRIDS[positions][1], args, kwargs)


_GRIDS = WeakIdKeyDictionary()
"""By tensor of positions: its version, and the grid. Reading the positions waits for the device."""


def _of_shapes(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Packed tokens with the shape of each sample's image (frames, height, width)."""
    shape = _argument(args, kwargs, 4, "img_shapes")[0]
    frames, height, width = shape[0] if isinstance(shape, list) else shape
    return _require_filled(Grid(height, width, frames), args, kwargs)


def _require_filled(grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    num_tokens = _argument(args, kwargs, 0, "hidden_states").shape[1]
    if grid.num_tokens != num_tokens:
        raise ValueError(
            f"the image tokens must be those of one image of {grid} tokens, "
            f"got {num_tokens}: pipelines that add tokens of reference images are not supported."
        )
    return grid


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "AuraFlowTransformer2DModel": Family(
            (
                Attentions(
                    "joint_transformer_blocks", "attn", "text-image", "AuraFlowAttnProcessor2_0"
                ),
                Attentions(
                    "single_transformer_blocks", "attn", "text-image", "AuraFlowAttnProcessor2_0"
                ),
            ),
            _of_image,
            timestep=2,
            clock=_NOISE_AT_ONE,
        ),
        "CogVideoXTransformer3DModel": Family(
            (Attentions("transformer_blocks", "attn1", "text-image", "CogVideoXAttnProcessor2_0"),),
            _of_frames_first,
            timestep=2,
            makes_videos=True,
        ),
        "FluxTransformer2DModel": Family(
            (
                Attentions("transformer_blocks", "attn", "text-image", "FluxAttnProcessor"),
                Attentions("single_transformer_blocks", "attn", "text-image", "FluxAttnProcessor"),
            ),
            _of_positions,
            timestep=3,
            clock=_NOISE_AT_ONE,
            patch_size=2,  # the pipeline packs latents before the model, which has patch_size 1
        ),
        "Flux2Transformer2DModel": Family(
            (
                Attentions("transformer_blocks", "attn", "text-image", "Flux2AttnProcessor"),
                Attentions(
                    "single_transformer_blocks",
                    "attn",
                    "text-image",
                    "Flux2ParallelSelfAttnProcessor",
                ),
            ),
            partial(_of_positions, place=3),
            timestep=2,
            clock=_NOISE_AT_ONE,
            patch_size=2,
        ),
        "HunyuanDiT2DModel": Family(
            (Attentions("blocks", "attn1", "image", "HunyuanAttnProcessor2_0"),),
            _of_image,
            timestep=1,
        ),
        "Lumina2Transformer2DModel": Family(
            (
                Attentions("noise_refiner", "attn", "image", "Lumina2AttnProcessor2_0"),
                Attentions("layers", "attn", "text-image-padding", "Lumina2AttnProcessor2_0"),
            ),
            _of_image,
            timestep=1,
            clock=_NOISE_AT_ZERO,
        ),
        "PixArtTransformer2DModel": Family(
            (
                Attentions(
                    "transformer_blocks", "attn1", "image", "AttnProcessor2_0", merges_input=True
                ),
            ),
            _of_image,
            timestep=2,
        ),
        "QwenImageTransformer2DModel": Family(
            (
                Attentions(
                    "transformer_blocks", "attn", "text-image", "QwenDoubleStreamAttnProcessor2_0"
                ),
            ),
            _of_shapes,
            timestep=3,
            clock=_NOISE_AT_ONE,
        ),
        "SD3Transformer2DModel": Family(
            (
                Attentions("transformer_blocks", "attn", "image-text", "JointAttnProcessor2_0"),
                Attentions("transformer_blocks", "attn2", "image", "JointAttnProcessor2_0"),
            ),
            _of_image,
            timestep=3,
        ),
        "WanTransformer3DModel": Family(
            (Attentions("blocks", "attn1", "image", "WanAttnProcessor"),),
            _of_video,
            timestep=1,
            makes_videos=True,
        ),
    }
)
"""The supported transformers by class."""


def require_image_denoiser(slot: str, config: Mapping[str, Any], model: str) -> str:
    """Refuse models that the commands can't generate images with.

    Args:
        slot: the denoiser's folder in the model, `"unet"` or `"transformer"`.
        config: its configuration.
        model: what the user gave.

    Returns:
        The denoiser's class in diffusers.

    Raises:
        ValueError: the class is not supported, or makes videos.
    """
    name = config.get("_class_name", "UNet2DConditionModel" if slot == "unet" else None)
    if slot == "unet":
        if name != "UNet2DConditionModel":
            raise ValueError(
                f"`model` must have a UNet2DConditionModel, got a {name} in {model!r}."
            )
        return str(name)
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        name = "PixArtTransformer2DModel"  # the name since diffusers 0.29
    images = [kind for kind, family in FAMILIES.items() if not family.makes_videos]
    videos = [kind for kind, family in FAMILIES.items() if family.makes_videos]
    if name in videos:
        raise ValueError(
            f"`model` must make images, got a {name} in {model!r}, which makes videos: patch its "
            "pipeline with `apply_patch`."
        )
    if name not in images:
        raise ValueError(
            f"`model` must have one of these transformers: {', '.join(images)}, got a {name} in "
            f"{model!r}."
        )
    return str(name)
