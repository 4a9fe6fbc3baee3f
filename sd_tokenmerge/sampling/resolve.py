"""Fill in options that were not given: the model's own settings, else those of its family."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from sd_tokenmerge.devices import best_device
from sd_tokenmerge.files import read_json_object
from sd_tokenmerge.sampling.call_defaults import call_defaults
from sd_tokenmerge.sampling.imagenet import CLASSES
from sd_tokenmerge.sampling.options import (
    PAPER_GUIDANCE,
    PAPER_SIZE,
    PAPER_STEPS,
    GenerateOptions,
    ResolvedOptions,
)

_PACKAGE = Path(__file__).parents[1]
SAMPLE_PIPELINES = (_PACKAGE / "sample_pipeline", _PACKAGE.parent / "samples" / "pipeline")
"""Where the embedded sample pipeline is: in an installed wheel, or in a checkout."""


def default_model() -> str:
    """The embedded sample pipeline's folder.

    Raises:
        ValueError: there is none, because this is neither a wheel nor a checkout.
    """
    for folder in SAMPLE_PIPELINES:
        if (folder / "model_index.json").is_file():
            return str(folder)
    raise ValueError(
        "`model` must be given: the sample pipeline, its default, is in neither of "
        f"{' and '.join(map(str, SAMPLE_PIPELINES))}."
    )


def resolve_options(options: GenerateOptions) -> ResolvedOptions:
    """Fill in every default, and write the merging options out in full.

    A diffusers folder may hold a `sample.json` with the settings that the model was made for
    (`classes`, `size`, `steps`, `guidance_scale`). The rest is filled in by the defaults of the
    pipeline's own call for a transformer (`call_defaults`), by the paper's protocol for a UNet.

    Raises:
        ValueError: no model is given and there is no sample pipeline, its `sample.json` or
            configuration is bad, or there is no such method.
    """
    model = default_model() if options.model is None else options.model
    device = best_device() if options.device is None else options.device
    defaults: dict[str, Any] = {
        "model": model,
        "height": PAPER_SIZE,
        "width": PAPER_SIZE,
        "steps": PAPER_STEPS,
        "guidance_scale": PAPER_GUIDANCE,
        "classes": tuple(range(len(CLASSES))),
        "device": device,
        "dtype": "float32" if device == "cpu" else "float16",
    }
    if None in (options.height, options.width, options.steps, options.guidance_scale):
        defaults |= call_defaults(
            model, revision=options.revision, local_files_only=options.local_files_only
        )
    defaults |= read_sample_settings(model)
    if options.prompts is not None:
        del defaults["classes"]
    given = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    resolved = defaults | {name: value for name, value in given.items() if value is not None}
    merging = None if options.merging is None else options.merging.resolved()
    return ResolvedOptions(**resolved | {"merging": merging})


def read_sample_settings(model: str) -> dict[str, Any]:
    """The options in the model folder's `sample.json`; empty if there is none.

    Raises:
        ValueError: it is not a JSON object, or a setting is out of range.
    """
    path = Path(model) / "sample.json"
    if not path.is_file():
        return {}
    content = read_json_object(path)
    settings: dict[str, Any] = {
        name: content[name] for name in ("steps", "guidance_scale") if name in content
    }
    if "size" in content:
        settings |= {"height": content["size"], "width": content["size"]}
    try:
        if "classes" in content:
            settings["classes"] = tuple(sorted(set(content["classes"])))
        GenerateOptions(out="-", **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return settings
