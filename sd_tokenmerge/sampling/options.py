"""`GenerateOptions`: every option of a run, declared once. Imports no torch.

`sd-tokenmerge generate`, `sweep` and `run.json` derive their options from the fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from sd_tokenmerge.config import PRESETS, MergeConfig
from sd_tokenmerge.options import option, require_options
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
"""ToMe-SD's and ATC's protocol for Stable Diffusion 1.5, the default of UNets."""

FAMILY_DEFAULT = "the model's own, else {} for UNets and diffusers' default for transformers"
"""What replaces an option that is None, for help texts; {} is the paper's value."""

NO_METHOD = "none"
"""Name of the unpatched pipeline, `merging=None`, on the command line."""

DType = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "model", "sequential"]
AttentionBackend = Literal["default", "eager", "sliced", "xformers", "flash", "efficient", "math"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `generate`; the fields' help texts describe them.

    None means the model's own setting (its `sample.json`), else the default of its family; see
    `resolve_options`. Fields with `compared=False` may change between two starts in one folder:
    they say where and how the work is done, or name files that are compared by content.

    Attributes:
        merging: how tokens are merged; None generates with the unpatched pipeline.
    """

    out: str = option("Run folder, a new one or one to resume.", compared=False)

    classes: tuple[int, ...] | None = option(
        'ImageNet classes, such as "0-9,magpie,n01440764".',
        default=None,
        parse=parse_classes,
        when_none="those the model was made for, else all 1,000",
        panel="Images",
    )
    images_per_class: int = option(
        "Images per class or prompt.", default=2, at_least=1, below=1 << 24, panel="Images"
    )
    prompts: str | None = option(
        "Prompt file instead of classes: .txt, one per line, or .jsonl with prompt and seed.",
        default=None,
        compared=False,
        panel="Images",
    )
    prompt_template: str = option(
        "Prompt with {class} for the class name.", default=PAPER_TEMPLATE, panel="Images"
    )
    class_names: NameStyle = option(
        "What replaces {class}: all synonyms, as in ATC's runs, or one short name.",
        default="atc",
        panel="Images",
    )
    negative_prompt: str | None = option(
        "Prompt to steer away from.", default=None, when_none="the pipeline's own", panel="Images"
    )
    seed: int = option(
        "Base of all seeds.", default=0, at_least=0, below=SEED_LIMIT, panel="Images"
    )
    seed_scheme: SeedScheme = option(
        "How image seeds are derived: paper, the seed plus the digits of class and image, for at "
        "most 10 images per class; or hashed, for any number.",
        default="paper",
        panel="Images",
    )
    height: int | None = option(
        "Image height in pixels, a multiple of 8 (of 16 for transformers).",
        default=None,
        at_least=8,
        below=16_384,  # above, one feature map of the VAE exceeds any device
        when_none="--size",
        panel="Images",
    )
    width: int | None = option(
        "Image width in pixels, a multiple of 8 (of 16 for transformers).",
        default=None,
        at_least=8,
        below=16_384,  # above, one feature map of the VAE exceeds any device
        when_none="--size",
        panel="Images",
    )
    steps: int | None = option(
        "Denoising steps.",
        default=None,
        at_least=1,
        below=10_000,
        when_none=FAMILY_DEFAULT.format(PAPER_STEPS),
        panel="Images",
    )
    guidance_scale: float | None = option(
        "Scale of classifier-free guidance, which 1 or less turns off; for distilled models, the "
        "scale that they take as an input.",
        default=None,
        at_least=0,
        when_none=FAMILY_DEFAULT.format(PAPER_GUIDANCE),
        panel="Images",
    )
    noise_device: str = option(
        "Where the initial noise is drawn: cpu, the same on every machine, or cuda, as in the "
        "paper's runs.",
        default="cpu",
        panel="Images",
    )

    merging: MergeConfig | None = field(default=PRESETS["paper"])

    model: str | None = option(
        "Hub id, diffusers folder or single-file checkpoint.",
        default=None,
        when_none="the embedded sample pipeline",
        panel="Model",
        compared=False,
    )
    model_config: str | None = option(
        "Diffusers folder with configurations and tokenizer, for a single-file checkpoint offline.",
        default=None,
        panel="Model",
        compared=False,
    )
    revision: str | None = option(
        "Branch, tag or commit of a hub id.", default=None, panel="Model", compared=False
    )
    variant: str | None = option(
        "Variant of the weight files, such as fp16.", default=None, panel="Model"
    )
    dtype: DType | None = option(
        "Precision of the pipeline.",
        default=None,
        when_none="float32 on the CPU, else float16",
        panel="Model",
    )
    device: str | None = option(
        "Torch device, such as cpu, cuda, cuda:1 or mps; runs resume on the same kind only.",
        default=None,
        when_none="the GPU if there is one",
        panel="Model",
        compared=False,
    )
    compile: bool = option(
        "Compile the UNet or transformer with torch.", default=False, panel="Model"
    )
    scheduler: str | None = option(
        "Scheduler, such as DDIM or EulerDiscrete.",
        default=None,
        when_none="the model's own",
        panel="Model",
    )
    vae: str | None = option(
        "Folder or hub id of another autoencoder.", default=None, panel="Model", compared=False
    )
    lora: tuple[str, ...] = option(
        "LoRA file, folder or hub id, with an optional @scale; repeatable.",
        default=(),
        panel="Model",
        compared=False,
    )
    attention_backend: AttentionBackend = option(
        "How attention is computed; flash, efficient and math are kernels of PyTorch, and the only "
        "choices for transformers.",
        default="default",
        panel="Model",
    )
    offload: Offload = option(
        "Keep weights on the CPU until they are used: whole models, or single layers in sequence.",
        default="none",
        panel="Model",
    )
    safety_checker: bool = option(
        "Run the model's own safety checker, which blacks images out.", default=False, panel="Model"
    )
    local_files_only: bool = option(
        "Never access the hub.", default=False, panel="Model", compared=False
    )

    batch_size: int = option(
        "Images per pipeline call; changes images by rounding only.",
        default=1,
        at_least=1,
        below=65_536,
        panel="Work",
        compared=False,
    )
    shard: str | None = option(
        "Generate one part only: 3/16 is the third of sixteen.",
        default=None,
        panel="Work",
        compared=False,
    )

    def __post_init__(self) -> None:
        """Check every value that can be checked without loading anything.

        Raises:
            TypeError: a value is of the wrong type.
            ValueError: a value is out of range, or two options exclude each other.
        """
        require_options(self)
        self._require_texts()
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % 8:
                raise ValueError(f"`{name}` must be a multiple of 8, got {getattr(self, name)}.")
        if self.guidance_scale is not None and not isfinite(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be finite, got {self.guidance_scale}.")
        if self.merging is not None and not isinstance(self.merging, MergeConfig):
            raise TypeError(f"`merging` must be a MergeConfig or None, got {self.merging!r}.")
        if self.prompts is None and self.seed_scheme == "paper" and self.images_per_class > 10:
            raise ValueError(
                f"`images_per_class` must be at most 10 with the paper's seeds, got "
                f"{self.images_per_class}: they would collide (class 1, image 10 and class 11, "
                f"image 0). Use the hashed `seed_scheme`."
            )
        if self.prompts is not None and self.classes is not None:
            raise ValueError("`prompts` and `classes` exclude each other, got both.")
        if self.classes is not None and not self.classes:
            raise ValueError("`classes` must name at least one class, got none.")
        if any(type(index) is not int for index in self.classes or ()):
            raise TypeError(f"`classes` must be integers, got {self.classes}.")
        if self.classes is not None and sorted(set(self.classes)) != list(self.classes):
            raise ValueError(f"`classes` must be ascending and distinct, got {self.classes}.")
        for index in self.classes or (0,):
            class_prompt(index, self.prompt_template, self.class_names)
        self.shard_numbers()

    def _require_texts(self) -> None:
        if not self.out:
            raise ValueError("`out` must name a folder, got an empty text.")
        if not all(isinstance(name, str) for name in self.lora):
            raise TypeError(f"`lora` must be texts, got {self.lora}.")
        for entry in fields(self):
            value = getattr(self, entry.name)
            try:
                "".join(value if entry.name == "lora" else [str(value)]).encode()
            except UnicodeEncodeError:
                raise ValueError(f"`{entry.name}` must be valid Unicode, got {value!r}.") from None

    def shard_numbers(self) -> tuple[int, int]:
        """`(index, count)` of `shard`, the index from 0.

        Raises:
            ValueError: `shard` is not "i/n" with 1 <= i <= n.
        """
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"`shard` must be i/n with i from 1 to n, such as 3/16, got {self.shard!r}."
            )
        return int(match[1]) - 1, int(match[2])

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values, for `run.json`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {
            "classes": None if self.classes is None else format_classes(self.classes),
            "lora": list(self.lora),
            "merging": None if self.merging is None else self.merging.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a missing option has its default.

        Raises:
            TypeError: an option is unknown, perhaps from another version, or of the wrong type.
            ValueError: an option is out of range.
        """
        given = dict(values)
        classes, lora = given.get("classes"), given.get("lora", [])
        if not isinstance(classes, str | None) or not isinstance(lora, list):
            raise TypeError(f"`classes` must be text and `lora` a list, got {classes!r}, {lora!r}.")
        given["classes"] = None if classes is None else parse_classes(classes)
        given["lora"] = tuple(lora)
        if given.get("merging") is not None:
            given["merging"] = MergeConfig.from_json(given["merging"])
        return cls(**given)

    def compared(self) -> dict[str, Any]:
        """The options that must stay the same when a run is resumed, as JSON values."""
        values = self.to_json()
        names = (entry.name for entry in fields(self) if entry.metadata.get("compared", True))
        merging = values["merging"] or {"method": NO_METHOD}
        merging = {"merge_seed" if name == "seed" else name: merging[name] for name in merging}
        return {name: values[name] for name in names if name != "merging"} | merging


class ResolvedOptions(GenerateOptions):
    """Options with all defaults filled in; made by `resolve_options`."""

    if TYPE_CHECKING:
        model: str
        height: int
        width: int
        steps: int
        guidance_scale: float
        dtype: DType
        device: str
