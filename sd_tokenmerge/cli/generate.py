"""`sd-tokenmerge generate`: images per class under fixed seeds, in a folder that can be resumed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import interruption, memory_errors, user_errors
from sd_tokenmerge.config import make_config
from sd_tokenmerge.sampling.imagenet import PAPER_TEMPLATE, parse_classes
from sd_tokenmerge.sampling.options import (
    DEFAULT_KEEP_RATE,
    DEFAULT_METHOD,
    NO_METHOD,
    PAPER_GUIDANCE,
    PAPER_SIZE,
    PAPER_STEPS,
    GenerateOptions,
)

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.run import RunSummary

_IMAGES = "Images"
_MERGING = "Merging"
_MODEL = "Model"
_WORK = "Work"


def generate_command(
    out: Annotated[str, typer.Option(help="The run folder, new or to be resumed.")],
    # Images
    classes: Annotated[
        str | None,
        typer.Option(
            help='ImageNet classes, such as "0-9,magpie,n01440764"; default: those the model is '
            "made for, else all 1,000.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    images_per_class: Annotated[
        int, typer.Option(help="Images per class or prompt.", rich_help_panel=_IMAGES)
    ] = 2,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Instead of classes: a .txt file, one prompt a line, or .jsonl with prompt and "
            "seed.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    prompt_template: Annotated[
        str, typer.Option(help="Text with {class}.", rich_help_panel=_IMAGES)
    ] = PAPER_TEMPLATE,
    class_names: Annotated[
        str,
        typer.Option(
            help="What stands for {class}: atc (all synonyms, as ATC's runs) or short (one name).",
            rich_help_panel=_IMAGES,
        ),
    ] = "atc",
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What to steer away from; default: the pipeline's own.", rich_help_panel=_IMAGES
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Base of all seeds.", rich_help_panel=_IMAGES)] = 0,
    seed_scheme: Annotated[
        str,
        typer.Option(
            help="paper (seed + the digits of class and image; 10 images per class at most) or "
            "hashed (any number).",
            rich_help_panel=_IMAGES,
        ),
    ] = "paper",
    size: Annotated[
        int | None,
        typer.Option(
            help=f"Height and width in pixels; default: the model's own, else {PAPER_SIZE}.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Instead of --size.", rich_help_panel=_IMAGES)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Instead of --size.", rich_help_panel=_IMAGES)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Denoising steps; default: the model's own, else {PAPER_STEPS}.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help=f"1: no guidance; default: the model's own, else {PAPER_GUIDANCE}.",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    noise_device: Annotated[
        str,
        typer.Option(
            help="Where noise is drawn: cpu (the same everywhere) or cuda (as the paper's runs).",
            rich_help_panel=_IMAGES,
        ),
    ] = "cpu",
    # Merging
    method: Annotated[
        str | None,
        typer.Option(
            help='Such as "atc:linkage=average", "tome-sd", or "none"; see '
            f"`sd-tokenmerge methods`. Default: {DEFAULT_METHOD}.",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings that belong together: paper (the papers), balanced or fast; what is "
            "given besides overrides it.",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    keep_rate: Annotated[
        str | None,
        typer.Option(
            help="Fraction of tokens kept, in (0, 1], or per cent (50%); default: "
            f"{DEFAULT_KEEP_RATE}, 1 without a method. It may change over the steps "
            "(linear:first=1,last=0.4 or during:rate=0.5,start=0,stop=0.6), over "
            "the blocks (depth:rate=0.7) or by level, finest 0 (0=0.5,1=depth:rate=0.8).",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    levels: Annotated[
        int,
        typer.Option(
            help="How many of the finest resolutions with self-attention are merged.",
            rich_help_panel=_MERGING,
        ),
    ] = 1,
    features: Annotated[
        str | None,
        typer.Option(
            help="What is clustered: input (of the block, the default) or keys (of its attention).",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(help="What is merged: qkv (the default), kv or q.", rich_help_panel=_MERGING),
    ] = None,
    refresh_every: Annotated[
        int | None,
        typer.Option(
            help="Steps from one partition to the next; default: 1.", rich_help_panel=_MERGING
        ),
    ] = None,
    share_layers: Annotated[
        bool | None,
        typer.Option(
            "--share-layers/--no-share-layers",
            help="Whether blocks with the same grid share a partition; default: no.",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    proportional_attention: Annotated[
        bool | None,
        typer.Option(
            "--proportional-attention/--no-proportional-attention",
            help="Whether attention counts a merged token as often as it stands for; default: no.",
            rich_help_panel=_MERGING,
        ),
    ] = None,
    merge_seed: Annotated[
        int, typer.Option(help="What random methods draw from.", rich_help_panel=_MERGING)
    ] = 0,
    # Model
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, diffusers folder or single-file checkpoint; default: the sample pipeline "
            "of the checkout.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            help="For a single-file checkpoint without the hub: a diffusers folder with "
            "configurations and tokenizer.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Variant of the weight files, such as fp16.", rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; default: float16, on the CPU float32.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, mps; default: the GPU if there is one.", rich_help_panel=_MODEL
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the UNet with torch.", rich_help_panel=_MODEL),
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Such as DDIM or EulerDiscrete; default: the model's own.", rich_help_panel=_MODEL
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of another autoencoder.", rich_help_panel=_MODEL),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA file, folder or hub id, with @scale; repeatable.", rich_help_panel=_MODEL
        ),
    ] = None,
    attention_backend: Annotated[
        str,
        typer.Option(
            help="default, eager, sliced, xformers, or a kind of SDPA: flash, efficient, math.",
            rich_help_panel=_MODEL,
        ),
    ] = "default",
    offload: Annotated[
        str,
        typer.Option(
            help="What waits on the CPU: none, model or sequential.", rich_help_panel=_MODEL
        ),
    ] = "none",
    safety_checker: Annotated[
        bool,
        typer.Option(
            "--safety-checker",
            help="Run the model's own, which blacks images out.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    local_files_only: Annotated[
        bool,
        typer.Option("--local-files-only", help="Never ask the hub.", rich_help_panel=_MODEL),
    ] = False,
    # Work
    batch_size: Annotated[
        int, typer.Option(help="Images per pipeline call.", rich_help_panel=_WORK)
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(help="Do one part only: 3/16 is the third of sixteen.", rich_help_panel=_WORK),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a run with other options in the folder.",
            rich_help_panel=_WORK,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=_WORK),
    ] = False,
) -> None:
    """Generate images per class under fixed seeds.

    The defaults are the protocol of the ATC paper: two images of each ImageNet class. May be
    stopped at any moment; the same command goes on where it was. Several processes share the
    work: `accelerate launch -m sd_tokenmerge generate ...`.
    """
    values: dict[str, Any] = dict(locals())
    for name in ("overwrite", "as_json"):
        del values[name]
    with user_errors():
        options = read_options(values)
    summary = run_generation(options, overwrite=overwrite)
    if summary is not None:
        _print_summary(summary, shard, as_json)


def read_options(values: dict[str, Any]) -> GenerateOptions:
    """The options that a command line describes, checked.

    Args:
        values: what was given for each parameter of `generate_command` that describes images,
            merging, model and work; those that are missing have their defaults.

    Raises:
        ValueError: a value is out of range, or two options exclude each other.
    """
    values = dict(values)
    size, classes = values.pop("size", None), values.get("classes")
    if size is not None:
        if values.get("height") is not None or values.get("width") is not None:
            raise ValueError("--size excludes --height and --width, got both.")
        values |= {"height": size, "width": size}
    values["classes"] = None if classes is None else parse_classes(classes)
    _fill_in_preset(values)
    values["lora"] = tuple(values.get("lora") or ())
    return GenerateOptions(**values)


def _fill_in_preset(values: dict[str, Any]) -> None:
    """Replace what merging options leave open by the preset's values, or the papers'."""
    name = values.pop("preset", None)
    if name is not None and values.get("method") == NO_METHOD:
        raise ValueError(f"--preset excludes --method {NO_METHOD}, got both.")
    preset = vars(make_config(preset="paper" if name is None else name)).copy()
    del preset["levels"], preset["seed"]
    preset["keep_rate"] = str(preset["keep_rate"])
    if name is None:  # left open: it depends on the method
        del preset["keep_rate"]
    for option, value in preset.items():
        if values.get(option) is None:
            values[option] = value


def run_generation(options: GenerateOptions, *, overwrite: bool = False) -> RunSummary | None:
    """Generate with progress on stderr and user errors as such.

    Returns:
        The summary; None in a process that is not the first of several.

    Raises:
        UserError: the input is bad, the disk is full, or memory does not suffice.
    """
    from sd_tokenmerge.cli.progress import ConsoleProgress
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.sampling.run import open_run

    with memory_errors(), ExitStack() as stack:
        with user_errors():
            opened = open_run(options, overwrite=overwrite, progress=ConsoleProgress())
            run = stack.enter_context(opened)
        try:
            summary = run.execute()
        except OSError as error:
            raise interruption(error) from error
    return summary if run.is_first_process else None


def _print_summary(summary: RunSummary, shard: str | None, as_json: bool) -> None:
    import json

    from sd_tokenmerge.cli.progress import format_count, format_duration, format_rate

    if as_json:
        print(json.dumps(asdict(summary) | {"images_per_second": summary.images_per_second}))
        return
    made = f"{summary.generated} generated"
    if summary.generated:
        rate = format_rate(summary.images_per_second)
        made += f" in {format_duration(summary.seconds)} ({rate})"
    images = format_count(summary.num_images, "image")
    there = f"{summary.already_there} {'was' if summary.already_there == 1 else 'were'} there"
    part = "" if shard is None else f" of shard {shard}"
    print(f"{summary.folder}: {images}{part}, {there}, {made}.")
