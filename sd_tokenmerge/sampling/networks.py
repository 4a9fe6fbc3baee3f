"""Load one network of a pipeline, and refuse weights that don't fit it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from sd_tokenmerge.files import read_json_object

# diffusers 0.40 renamed `torch_dtype` to `dtype`.
_VERSION = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
DTYPE_ARGUMENT = "dtype" if _VERSION >= (0, 40) else "torch_dtype"
"""What diffusers calls the dtype of a pipeline or network."""


def network_class(library: str, name: str) -> Any:
    """The class of a component in a `model_index.json`, or None if it isn't a network.

    Args:
        library: `"diffusers"`, `"transformers"` or a module of `diffusers.pipelines`.
        name: the class's name.
    """
    libraries = {"diffusers": diffusers, "transformers": transformers}
    module = libraries.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(module, name, None)
    is_network = isinstance(found, type) and issubclass(found, torch.nn.Module)
    return found if is_network else None


def load_network(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """A network, in evaluation mode, with the weights in `folder`.

    Of missing weights, diffusers and transformers only warn, and leave them random or without
    values.

    Args:
        cls: the network's class, in diffusers or transformers.
        folder: holds `config.json` and the weights.
        dtype: that of the weights in memory.
        variant: load the files of this variant, such as `"fp16"`, if there are any.

    Raises:
        ValueError: weights are missing, unexpected, of another shape, of integer type, or not
            finite in `dtype`.
    """
    if "quantization_config" not in read_json_object(folder / "config.json"):
        _refuse_integers(folder)
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if variant and any(variant in file.name.split(".")[1:-1] for file in folder.iterdir()):
        options["variant"] = variant
    if issubclass(cls, transformers.PreTrainedModel):
        # Without `ignore_mismatched_sizes`, its error does not say which weights.
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options[DTYPE_ARGUMENT] = dtype
    network, report = cls.from_pretrained(folder, **options)
    faults = [
        f"{fault} {_listed(report[f'{fault}_keys'])}"
        for fault in ("missing", "unexpected", "mismatched")
        if report[f"{fault}_keys"]
    ]
    if faults:
        raise ValueError(f"its weights do not fit {cls.__name__}: {'; '.join(faults)}.")
    # Infinite pixels would not show: they are clamped to black and white.
    infinite = [name for name, value in network.named_parameters() if not value.isfinite().all()]
    if infinite:
        raise ValueError(f"its weights must be finite in {dtype}, got {_listed(infinite)}.")
    return network


def _refuse_integers(folder: Path) -> None:
    """Refuse integer weights, which the loaders would cast to `dtype` without a word."""
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                types = {name: file.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError):
            continue  # an unused variant, or the loader reports it
        integers = [
            name
            for name, dtype in types.items()
            if not dtype.startswith(("F", "BF")) and not name.endswith("position_ids")
        ]
        if integers:
            raise ValueError(
                f"its weights must be floating point numbers, got {types[integers[0]]} for "
                f"{_listed(integers)} in {path.name}."
            )


def _listed(keys: Collection[Any], most: int = 3) -> str:
    # A mismatch is reported as a tuple of name and shapes.
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
