"""Fill in what the user left open: the model's own settings, else the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd_tokenmerge.devices import best_device
from sd_tokenmerge.sampling.imagenet import CLASSES
from sd_tokenmerge.sampling.options import (
    DEFAULT_KEEP_RATE,
    NO_METHOD,
    PAPER_GUIDANCE,
    PAPER_SIZE,
    PAPER_STEPS,
    DType,
    GenerateOptions,
    ResolvedOptions,
    canonical_keep_rate,
)

SAMPLE_PIPELINE = Path(__file__).parents[2] / "samples" / "pipeline"
"""The embedded sample pipeline, in a checkout."""


def default_model() -> str:
    """The embedded sample pipeline's folder.

    Raises:
        ValueError: this is no checkout, so there is none.
    """
    if not (SAMPLE_PIPELINE / "model_index.json").is_file():
        raise ValueError(
            "`model` must be given: the sample pipeline, its default, exists only in a checkout "
            f"of the repository (looked in {SAMPLE_PIPELINE})."
        )
    return str(SAMPLE_PIPELINE)


def resolve_options(options: GenerateOptions) -> ResolvedOptions:
    """Replace every None that has a default by it; write method and keep rate in canonical form.

    A diffusers folder may hold a `sample.json` that says what the model was made for (`classes`,
    `size`, `steps`, `guidance_scale`). Where it says nothing, the paper's protocol holds.

    Raises:
        ValueError: no model is given and there is no sample pipeline, its `sample.json` is bad, or
            there is no such method.
    """
    model = default_model() if options.model is None else options.model
    own = read_sample_settings(model)
    size = own.get("size", PAPER_SIZE)
    classes = options.classes
    if classes is None and options.prompts is None:
        classes = tuple(sorted(own.get("classes", range(len(CLASSES)))))
    device = best_device() if options.device is None else options.device
    dtype: DType = "float32" if device == "cpu" else "float16"
    filled: dict[str, Any] = {
        "model": model,
        "height": size,
        "width": size,
        "steps": own.get("steps", PAPER_STEPS),
        "guidance_scale": own.get("guidance_scale", PAPER_GUIDANCE),
        "keep_rate": 1.0 if options.method == NO_METHOD else DEFAULT_KEEP_RATE,
        "device": device,
        "dtype": dtype,
    }
    given = {name: value for name, value in vars(options).items() if value is not None}
    chosen = filled | given | {"classes": classes, "method": canonical_method(options.method)}
    return ResolvedOptions(**chosen | {"keep_rate": canonical_keep_rate(chosen["keep_rate"])})


def canonical_method(text: str) -> str:
    """A method string as the method itself writes it: `"atc:linkage=average"` is `"atc"`.

    Raises:
        ValueError: there is no such method, or an option of it is bad.
    """
    if text == NO_METHOD:
        return text
    from sd_tokenmerge.methods import parse_method

    return str(parse_method(text))


def read_sample_settings(model: str) -> dict[str, Any]:
    """The content of the model folder's `sample.json`; empty where there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    path = Path(model) / "sample.json"
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(settings).__name__}.")
    return settings
