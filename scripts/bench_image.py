"""Time of a whole picture: a Stable Diffusion pipeline of a real architecture with random weights.

    python scripts/bench_image.py --minutes 20       # SD 1.5 at 512 px, 20 steps, guidance on
    python scripts/bench_image.py --quick            # the sample pipeline: does it run?

The pipeline is called as a user calls it: tokenizer, text encoder, scheduler, UNet (two images, the
branches of guidance) and decoder. Contestants take turns, in another order in every round. A
picture takes minutes on a CPU, over which a machine is not always equally fast: so a call of the
unpatched UNet is timed before and after each picture, and speed-ups compare pictures by how many
such calls they are worth.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine, percentile
from pipeline_contestants import CONTESTANTS, Contestant, rotated
from timed_unet import CASES, QUICK, Case, TimedUNet, add_model_arguments, milliseconds, read_config
from unet_gate import require_sound

from sd_tokenmerge.cli.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "case", "contestant", "dtype", "steps", "unet_calls", "repeats"),
    *("image_s", "image_s_20", "image_s_80", "unet_s", "unpatched_call_ms", "speedup"),
    *MACHINE_FIELDS,
)
DEFAULT = (
    *("unpatched", "oracle-qkv-50", "tomesd-50", "atc-keys-50-refresh-10"),
    *("preset-balanced", "preset-fast"),
)
PROMPT = "A high quality photograph of a magpie."


@dataclass(frozen=True)
class Picture:
    """How long one picture took, in seconds.

    Attributes:
        image: the whole call of the pipeline.
        unet: its calls of the UNet.
        unet_calls: how many these are.
        unpatched_call: a call of the unpatched UNet, mean of before and after.
    """

    image: float
    unet: float
    unet_calls: int
    unpatched_call: float

    @property
    def worth(self) -> float:
        """In calls of the unpatched UNet."""
        return self.image / self.unpatched_call


class Painter:
    """A pipeline with random weights, and the time of its pictures."""

    def __init__(self, folder: Path, name: str, case: Case, arguments: argparse.Namespace) -> None:
        """Build the pipeline.

        Args:
            folder: of models' configurations, in diffusers' layout.
            name: of the case, for messages.
            case: which of them, and the pictures' size.
            arguments: the command line.
        """
        self.name = name
        self.pixels = case.pixels
        self.steps: int = arguments.steps
        config = read_config(folder, case.config)
        self.calls = TimedUNet(config, case.latent, 2, arguments.device, arguments.dtype)
        self.pipe = build_pipeline(folder / case.config, self.calls)
        self._spent: list[float] = []
        self._started = 0.0
        self.calls.unet.register_forward_pre_hook(self._begin)
        self.calls.unet.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self.calls.synchronize()
        self._started = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.calls.synchronize()
        self._spent.append(time.perf_counter() - self._started)

    def unpatched_call(self) -> float:
        """Seconds of a call of the unpatched UNet."""
        return self.calls.timed(self.calls.timesteps()[10])

    def paint(self, one: Contestant) -> tuple[float, float, int]:
        """Seconds of one picture, those in the UNet, and its calls.

        Raises:
            SystemExit: the picture is not finite.
        """
        self._spent.clear()
        with one.on(self.calls.unet):
            start = time.perf_counter()
            picture = self.pipe(
                PROMPT,
                num_inference_steps=self.steps,
                guidance_scale=7.5,
                height=self.pixels,
                width=self.pixels,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
            self.calls.synchronize()
            taken = time.perf_counter() - start
        if not np.isfinite(picture).all():
            sys.exit(f"{self.name}: the picture of {one.name} is not finite.")
        return taken, sum(self._spent), len(self._spent)

    def run(
        self, contestants: list[Contestant], seconds: float, rounds: int
    ) -> dict[str, list[Picture]]:
        """Take turns for so long, or so many rounds; at least one."""
        pictures: dict[str, list[Picture]] = {one.name: [] for one in contestants}
        started = time.perf_counter()
        self.unpatched_call()  # for warming up
        before = self.unpatched_call()
        for number in range(rounds):
            begun = time.perf_counter()
            for one in rotated(contestants, number):
                image, unet, unet_calls = self.paint(one)
                after = self.unpatched_call()
                pictures[one.name].append(Picture(image, unet, unet_calls, (before + after) / 2))
                before = after
                print(f"{self.name}: {one.name} {image:.1f} s", file=sys.stderr)
            now = time.perf_counter()
            if now - started + 0.9 * (now - begun) > seconds:
                break
        return pictures


def build_pipeline(folder: Path, calls: TimedUNet) -> Any:
    """The pipeline that a folder's configurations describe, with random weights and this UNet."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, index["scheduler"][1])
    autoencoder = getattr(diffusers, index["vae"][1])
    text_config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    with calls.device:
        vae = autoencoder.from_config(autoencoder.load_config(folder / "vae"))
        text_encoder = transformers.CLIPTextModel(text_config)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.to(calls.dtype).eval(),
        text_encoder=text_encoder.to(calls.dtype).eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=calls.unet,
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows(pictures: dict[str, list[Picture]], case: str, steps: int) -> list[dict[str, object]]:
    """One row for each contestant, without the machine's columns."""
    worth = {
        name: statistics.median(one.worth for one in taken) for name, taken in pictures.items()
    }
    found = []
    for name, taken in pictures.items():
        seconds = [one.image for one in taken]
        row: dict[str, object] = {
            "benchmark": "image",
            "case": case,
            "contestant": name,
            "steps": steps,
            "unet_calls": taken[0].unet_calls,
            "repeats": len(taken),
            "image_s": f"{statistics.median(seconds):.2f}",
            "image_s_20": f"{percentile(seconds, 0.2):.2f}",
            "image_s_80": f"{percentile(seconds, 0.8):.2f}",
            "unet_s": f"{statistics.median(one.unet for one in taken):.2f}",
            "unpatched_call_ms": milliseconds(statistics.median(p.unpatched_call for p in taken)),
            "speedup": f"{worth['unpatched'] / worth[name]:.3f}" if "unpatched" in worth else "",
        }
        found.append(row)
        print(f"{case:10} {name:24} {row['image_s']:>8} s  {row['speedup']}x")
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sd15 = [name for name, case in CASES.items() if case.config == "stable-diffusion-v1-5"]
    parser.add_argument("--case", choices=sd15, default="sd15-512")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=DEFAULT)
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=20.0, help="at least one round is made")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "image.csv")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds = 2, 1
    return arguments


def main() -> None:
    """Build, check, paint."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.quick:
        painter = Painter(ROOT / "samples", QUICK, Case("pipeline", 256), arguments)
    else:
        case = CASES[arguments.case]
        painter = Painter(arguments.configs, arguments.case, case, arguments)
    contestants = [CONTESTANTS[name] for name in arguments.contestants]
    require_sound(painter.calls, contestants, painter.name)
    print(f"{painter.name}: checks passed", file=sys.stderr)
    pictures = painter.run(contestants, arguments.minutes * 60, arguments.rounds)
    machine = describe_machine(str(painter.calls.device)) | {"dtype": arguments.dtype}
    found = [row | machine for row in rows(pictures, painter.name, arguments.steps)]
    if not arguments.quick:
        append_rows(arguments.out, FIELDS, found)
        print(f"appended to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
