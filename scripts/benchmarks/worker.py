"""A process that runs one version of sd_tokenmerge, told what to do by JSON lines.

`against` starts one for each version, in that version's checkout. Requests and answers:

    {"do": "prepare", "benchmark": ..., "name": ..., "case": ..., ...}    {"labels": ...}
    {"do": "run"}                                   {"wall": seconds, "cpu": seconds}

Only the stable public functions of sd_tokenmerge may be used here: `parse_method`, `Grid`,
`apply_patch`, `PRESETS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sd_tokenmerge
from benchmarks.cases import build
from benchmarks.self_attention import SelfAttentionCalls
from benchmarks.tokens import Tokens
from benchmarks.unet_calls import UNetCalls
from sd_tokenmerge.bench.calls import timed_step
from sd_tokenmerge.bench.gate import require_sound
from sd_tokenmerge.bench.turns import Cost, timed

Prepared = tuple[Callable[[], Cost], dict[str, Any]]


def prepare_clustering(name: str, case: dict[str, Any]) -> Prepared:
    """Cluster tokens by the method of that name."""
    method, field = sd_tokenmerge.parse_method(name), Tokens(**case)
    tokens, grid = field.draw("cpu"), sd_tokenmerge.Grid(field.grid, field.grid)

    def cluster() -> Any:
        return method(tokens, field.clusters, grid=grid)

    return lambda: timed(cluster), {"labels": digest(cluster().labels)}


def digest(labels: torch.Tensor) -> str:
    """A hash of a partition, independent of the numbering of its clusters."""
    numbers = hashlib.sha256()
    for image in labels.cpu():
        first = torch.full((int(image.max()) + 1,), len(image))
        first.scatter_reduce_(0, image, torch.arange(len(image)), "amin")
        numbers.update(first[image].numpy().tobytes())
    return numbers.hexdigest()


class Preset:
    """A preset as a contestant."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.preset = name.removeprefix("preset-")
        self.refresh_every = sd_tokenmerge.PRESETS[self.preset].refresh_every

    @contextmanager
    def on(self, unet: Any) -> Any:
        """Patch the UNet for as long as the context lasts."""
        with sd_tokenmerge.apply_patch(unet, preset=self.preset):
            yield


def prepare_step(name: str, case: str, batch: int) -> Prepared:
    """A denoising step of a UNet under a preset."""
    return _prepare_unet(name, build(case, batch=batch), only_self_attention=False)


def prepare_self_attention(name: str, case: str, batch: int) -> Prepared:
    """The merged self-attentions of a denoising step under a preset."""
    return _prepare_unet(name, build(case, batch=batch), only_self_attention=True)


def _prepare_unet(name: str, calls: UNetCalls, *, only_self_attention: bool) -> Prepared:
    preset = Preset(name)
    require_sound(calls, [preset])
    measured = SelfAttentionCalls(calls) if only_self_attention else calls

    def step() -> Cost:
        with preset.on(calls.denoiser):
            return timed_step(measured, preset.refresh_every)[0]

    step()
    return step, {}


PREPARE: dict[str, Callable[..., Prepared]] = {
    "clustering": prepare_clustering,
    "unet-step": prepare_step,
    "self-attention-step": prepare_self_attention,
}


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not disturb the protocol
    package = Path(sd_tokenmerge.__file__).resolve().parent
    if package.parent != Path.cwd().resolve():
        sys.exit(f"sd_tokenmerge must be that of {Path.cwd()}, got {package}.")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run: Callable[[], Cost] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "prepare":
            run, answer = PREPARE[request.pop("benchmark")](**request)
        elif run is None:
            sys.exit("prepare a case before running it.")
        else:
            answer = run()._asdict()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
