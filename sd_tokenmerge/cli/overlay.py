"""`sd-tokenmerge overlay`: the clusters of merged tokens, drawn over a generated picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import UserError, generation_errors, interruption, user_errors
from sd_tokenmerge.cli.field_options import with_options
from sd_tokenmerge.cli.generate import Preset, Size, read_options
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions

if TYPE_CHECKING:
    from PIL import Image

    from sd_tokenmerge.patching.recording import Recording

_FILES = ("picture.png", "clusters.png", "clusters.gif")


@with_options(
    GenerateOptions,
    MergeConfig,
    without=("out", "images_per_class", "prompts", "safety_checker", "batch_size", "shard"),
)
def overlay_command(
    *,
    out: Annotated[str, typer.Option(help="Folder for the pictures.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt. Default: that of the first class.", rich_help_panel="Images"),
    ] = None,
    show_steps: Annotated[
        str | None,
        typer.Option(help='Steps to draw, such as "1,13,25". Default: five, first to last.'),
    ] = None,
    show_blocks: Annotated[
        str | None,
        typer.Option(
            help="Blocks to draw, separated by commas; the first is animated. "
            "Default: up to five, first to last; see `sd-tokenmerge sites`."
        ),
    ] = None,
    size: Size = None,
    preset: Preset = None,
    **values: Any,
) -> None:
    """Generate one picture, and draw over it which tokens were merged.

    Writes picture.png, the first picture that `generate` makes with the same options; clusters.png,
    its clusters of tokens by step and block; and clusters.gif, those of one block step by step.
    Files of these names in the folder are replaced.
    """
    if values.get("method") == NO_METHOD:
        raise UserError(f"--method must merge tokens, got {NO_METHOD}.")
    if prompt is not None and values.get("classes") is not None:
        raise UserError("--prompt and --classes exclude each other, got both.")
    options = read_options(values | {"out": out, "size": size, "preset": preset})
    steps = None if show_steps is None else _read_steps(show_steps)
    blocks = None if show_blocks is None else show_blocks.split(",")
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()
    try:
        with user_errors(OSError):
            Path(out).mkdir(parents=True, exist_ok=True)
        with generation_errors():
            picture, recording = _generate(options, prompt, steps)
        _write(Path(out), picture, recording, steps, blocks)
    except OSError as error:
        raise interruption(error) from error
    print("\n".join(str(Path(out, name)) for name in _FILES))


def _read_steps(text: str) -> list[int]:
    """Numbers from 1, as indices."""
    try:
        steps = [int(part) - 1 for part in text.split(",")]
    except ValueError:
        steps = [-1]
    if min(steps) < 0:
        raise UserError(f"--show-steps must be numbers from 1, such as 1,13,25, got {text!r}.")
    return steps


def _generate(
    options: GenerateOptions, prompt: str | None, steps: list[int] | None
) -> tuple[Image.Image, Recording]:
    from sd_tokenmerge.sampling.load import load_pipeline
    from sd_tokenmerge.sampling.merging import patched
    from sd_tokenmerge.sampling.plan import ImageJob, plan_images
    from sd_tokenmerge.sampling.recorded import recorded_picture
    from sd_tokenmerge.sampling.resolve import resolve_options
    from sd_tokenmerge.sampling.sampler import Sampler
    from sd_tokenmerge.sampling.seeds import image_seed

    with user_errors():
        resolved = resolve_options(options)
        if prompt is None:
            job = plan_images(resolved)[0]
        else:
            job = ImageJob(0, 0, image_seed(options.seed, 0, 0, options.seed_scheme), prompt)
        for step in steps or ():
            if step >= resolved.steps:
                raise UserError(f"--show-steps must be in [1, {resolved.steps}], got {step + 1}.")
        pipe = load_pipeline(resolved)
        sampler = Sampler(pipe, resolved)
        patch = patched(pipe, resolved)
    with patch as handle:
        picture, _, recording = recorded_picture(handle, sampler, job)
    return picture, recording


def _write(
    folder: Path,
    picture: Image.Image,
    recording: Recording,
    steps: list[int] | None,
    blocks: list[str] | None,
) -> None:
    from sd_tokenmerge.report.overlay import (
        draw_cluster_frames,
        draw_cluster_grid,
        save_animation,
    )

    with user_errors(ValueError, flags={"block": "--show-blocks"}):
        sheet = draw_cluster_grid(picture, recording, steps=steps, blocks=blocks)
        frames = draw_cluster_frames(picture, recording, None if blocks is None else blocks[0])
    picture.save(folder / "picture.png")
    sheet.save(folder / "clusters.png", optimize=True)
    save_animation(frames, folder / "clusters.gif")
