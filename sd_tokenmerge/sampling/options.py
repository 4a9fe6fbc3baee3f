"""Everything a run is told, in one JSON-able dataclass. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from sd_tokenmerge.config import Features, Merge
from sd_tokenmerge.keep_rates import Constant, KeepRate, format_keep_rates, parse_keep_rates
from sd_tokenmerge.sampling.imagenet import (
    PAPER_TEMPLATE,
    NameStyle,
    class_prompt,
    format_classes,
    parse_classes,
)
from sd_tokenmerge.sampling.seeds import SEED_LIMIT, SeedScheme

if TYPE_CHECKING:
    from typing_extensions import Self

PAPER_SIZE, PAPER_STEPS, PAPER_GUIDANCE = 512, 50, 7.5
"""ToMe-SD's and ATC's protocol for Stable Diffusion 1.5."""

DEFAULT_METHOD, DEFAULT_KEEP_RATE = "atc", 0.5
"""The defaults of `apply_patch`."""

NO_METHOD = "none"
"""The method string of an unpatched pipeline."""

MERGING = (
    *("levels", "features", "merge", "refresh_every"),
    *("share_layers", "proportional_attention", "merge_seed"),
)
"""How is merged, besides method and keep rate."""

DType = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "model", "sequential"]
AttentionBackend = Literal["default", "eager", "sliced", "xformers", "flash", "efficient", "math"]

# Says where and how a run is carried out, or names a file whose content is compared instead.
_NOT_COMPARED = {"compared": False}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `generate`.

    None means: what the model's own `sample.json` says, else the paper's protocol; see
    `sampling.resolve`. Fields marked "not compared" may change between two starts in one folder.

    Attributes:
        out: the run folder (not compared).
        model: hub id, diffusers folder, or single-file checkpoint; compared by content.
        classes: ImageNet indices; None: the model's own classes, else all 1,000.
        images_per_class: also per prompt, where `prompts` are given.
        prompts: file with prompts, instead of classes; compared by content.
        prompt_template: text with `{class}`.
        class_names: what stands for `{class}`.
        negative_prompt: None: the pipeline's own unconditional branch.
        seed: base of all seeds.
        seed_scheme: see `image_seed`.
        height: pixels.
        width: pixels.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less: none.
        noise_device: where the initial noise is drawn: the CPU gives the same on every machine,
            the GPU follows the paper's runs literally.
        method: a method string, or `"none"` for the unpatched pipeline.
        keep_rate: a number or string, see `apply_patch`, as for the next seven; None: 0.5, and 1
            without a method.
        levels: finest resolutions that are merged.
        features: what is clustered.
        merge: which of queries, keys and values are merged.
        refresh_every: denoising steps between two partitions.
        share_layers: whether blocks with the same grid share a partition.
        proportional_attention: whether attention counts a merged token as often as it stands for.
        merge_seed: what random methods draw from.
        model_config: folder with the configuration of a single-file checkpoint, to load it without
            the hub (not compared: its effect is in the loaded model's configuration).
        revision: of a hub id (not compared: its content is).
        variant: weights file variant such as `"fp16"`.
        dtype: None: float16 on a GPU, float32 on the CPU.
        device: torch device; None: the GPU if there is one. Its type is compared.
        compile: whether the denoiser is compiled.
        scheduler: diffusers class, with or without "Scheduler"; None: the model's own.
        vae: hub id or folder of another autoencoder; compared by content.
        lora: file, folder or hub id, each with an optional `@scale`; compared by content.
        attention_backend: how attention is computed.
        offload: which parts wait on the CPU.
        safety_checker: whether the model's safety checker runs, where it has one.
        batch_size: images per call (not compared: it changes images by rounding only).
        shard: `"3/16"`: only the third sixteenth of the images (not compared).
        local_files_only: never ask the hub (not compared).
    """

    out: str = field(metadata=_NOT_COMPARED)
    model: str | None = field(default=None, metadata=_NOT_COMPARED)

    classes: tuple[int, ...] | None = None
    images_per_class: int = 2
    prompts: str | None = field(default=None, metadata=_NOT_COMPARED)
    prompt_template: str = PAPER_TEMPLATE
    class_names: NameStyle = "atc"
    negative_prompt: str | None = None

    seed: int = 0
    seed_scheme: SeedScheme = "paper"
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    noise_device: str = "cpu"

    method: str = DEFAULT_METHOD
    keep_rate: float | str | None = None
    levels: int = 1
    features: Features = "input"
    merge: Merge = "qkv"
    refresh_every: int = 1
    share_layers: bool = False
    proportional_attention: bool | None = None
    merge_seed: int = 0

    model_config: str | None = field(default=None, metadata=_NOT_COMPARED)
    revision: str | None = field(default=None, metadata=_NOT_COMPARED)
    variant: str | None = None
    dtype: DType | None = None
    device: str | None = field(default=None, metadata=_NOT_COMPARED)
    compile: bool = False
    scheduler: str | None = None
    vae: str | None = field(default=None, metadata=_NOT_COMPARED)
    lora: tuple[str, ...] = field(default=(), metadata=_NOT_COMPARED)
    attention_backend: AttentionBackend = "default"
    offload: Offload = "none"
    safety_checker: bool = False

    batch_size: int = field(default=1, metadata=_NOT_COMPARED)
    shard: str | None = field(default=None, metadata=_NOT_COMPARED)
    local_files_only: bool = field(default=False, metadata=_NOT_COMPARED)

    def __post_init__(self) -> None:
        """Check every value that can be checked without loading anything.

        Raises:
            ValueError: a value is out of range, or two options exclude each other.
        """
        for name in ("images_per_class", "steps", "levels", "refresh_every", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise ValueError(f"`{name}` must be a positive multiple of 8, got {value}.")
        for name in ("seed", "merge_seed"):
            value = getattr(self, name)
            if not 0 <= value < SEED_LIMIT:
                raise ValueError(f"`{name}` must be in [0, 2^63), got {value}.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        if self.prompts is None and self.seed_scheme == "paper" and self.images_per_class > 10:
            raise ValueError(
                f"`images_per_class` must be at most 10 with the paper's seeds, got "
                f"{self.images_per_class}: they would collide (class 1, image 10 and class 11, "
                f"image 0). Use the hashed `seed_scheme`."
            )
        if self.keep_rate is not None:
            self._check_keep_rate(self.keep_rate)
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"`guidance_scale` must be finite and not negative, got {self.guidance_scale}."
            )
        if self.prompts is not None and self.classes is not None:
            raise ValueError("`prompts` and `classes` exclude each other, got both.")
        if self.classes is not None and not self.classes:
            raise ValueError("`classes` must name at least one class, got none.")
        for index in self.classes or (0,):
            class_prompt(index, self.prompt_template, self.class_names)
        self.shard_numbers()

    def _check_keep_rate(self, keep_rate: float | str) -> None:
        parsed = parse_keep_rates(keep_rate)
        if self.method == NO_METHOD and parsed != Constant(1):
            raise ValueError(f"`keep_rate` must be 1 without a method, got {keep_rate}.")
        if not isinstance(parsed, KeepRate) and self.levels != 1:
            raise ValueError(
                f"`levels` must be left out where `keep_rate` names them, got {self.levels}."
            )

    def shard_numbers(self) -> tuple[int, int]:
        """`(index, count)` of `shard`, the index from 0.

        Raises:
            ValueError: `shard` is not "i/n" with 1 <= i <= n.
        """
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"`shard` must be i/n with i from 1 to n, such as 3/16, got {self.shard!r}."
            )
        return int(match[1]) - 1, int(match[2])

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values, for `run.json`."""
        values = asdict(self)
        values["lora"] = list(self.lora)
        values["classes"] = None if self.classes is None else format_classes(self.classes)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            TypeError: an option is unknown: the folder was written by another version.
        """
        given = dict(values)
        if given.get("classes") is not None:
            given["classes"] = parse_classes(given["classes"])
        given["lora"] = tuple(given.get("lora", ()))
        return cls(**given)

    def compared(self) -> dict[str, Any]:
        """What must not change between two starts in one folder, as JSON values."""
        values = self.to_json()
        return {
            entry.name: values[entry.name]
            for entry in fields(self)
            if entry.metadata.get("compared", True)
        }


def canonical_keep_rate(value: float | str) -> float | str:
    """A number where the keep rate is always the same, else the string it has itself.

    Raises:
        TypeError: `value` is neither a number nor a string.
        ValueError: it is no keep rate.
    """
    parsed = parse_keep_rates(value)
    return float(parsed.rate) if isinstance(parsed, Constant) else format_keep_rates(parsed)


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(GenerateOptions):
    """Options in which nothing is left open; `resolve_options` makes them."""

    model: str = field(metadata=_NOT_COMPARED)
    height: int
    width: int
    steps: int
    guidance_scale: float
    keep_rate: float | str
    dtype: DType
    device: str = field(metadata=_NOT_COMPARED)


_CHOICES: dict[str, tuple[str, ...]] = {
    "class_names": get_args(NameStyle),
    "seed_scheme": get_args(SeedScheme),
    "features": get_args(Features),
    "merge": get_args(Merge),
    "dtype": get_args(DType),
    "offload": get_args(Offload),
    "attention_backend": get_args(AttentionBackend),
}
