"""Load one network of a pipeline, and refuse weights that don't fit it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from sd_tokenmerge.files import read_json_object
from sd_tokenmerge.network_size import limited_size

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
        ValueError: the configuration asks for more weights than the files can hold, or weights are
            missing, unexpected, of another shape, of integer type, or not finite in `dtype`.
    """
    if "quantization_config" not in read_json_object(folder / "config.json"):
        for path in folder.glob("*.safetensors"):
            with suppress(SafetensorError, OSError):  # an unused variant, or the loader reports it
                refuse_integers(path)
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if variant and any(variant in file.name.split(".")[1:-1] for file in folder.iterdir()):
        options["variant"] = variant
    if issubclass(cls, transformers.PreTrainedModel):
        # Without `ignore_mismatched_sizes`, its error does not say which weights.
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options[DTYPE_ARGUMENT] = dtype
    num_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    with limited_size(num_bytes):
        network, report = cls.from_pretrained(folder, **options)
    faults = [
        f"{fault} {_listed(report[f'{fault}_keys'])}"
        for fault in ("missing", "unexpected", "mismatched")
        if report[f"{fault}_keys"]
    ]
    if faults:
        raise ValueError(f"its weights do not fit {cls.__name__}: {'; '.join(faults)}.")
    require_finite(network)
    return network


def require_finite(network: torch.nn.Module) -> None:
    """Refuse weights whose pixels would not show them: infinity is clamped to black or white.

    Raises:
        ValueError: a weight is infinite or NaN, or has no value because its file lacks it.
    """
    weights = dict(network.named_parameters())
    missing = [name for name, weight in weights.items() if weight.is_meta]
    require_complete(network, missing)
    infinite = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if infinite:
        raise ValueError(
            f"its weights for {type(network).__name__} must be finite in "
            f"{weights[infinite[0]].dtype}, got {_listed(infinite)}."
        )


def require_complete(network: torch.nn.Module, missing: Collection[str]) -> None:
    """Refuse weights that are not all there.

    Args:
        network: whose weights they are.
        missing: names of those that its file lacks.

    Raises:
        ValueError: there are some.
    """
    if missing:
        raise ValueError(
            f"its weights do not fit {type(network).__name__}: missing {_listed(missing)}."
        )


def refuse_integers(path: Path) -> None:
    """Refuse integer weights, which the loaders would cast to another type without a word.

    Args:
        path: a `.safetensors` file.

    Raises:
        ValueError: a weight is an integer; positions and single numbers, such as counts of steps,
            are none.
        SafetensorError, OSError: the file cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in list(file.keys())}
        integers = {
            name: part.get_dtype()
            for name, part in parts.items()
            if not part.get_dtype().startswith(("F", "BF"))
            and part.get_shape()
            and not name.endswith("position_ids")
        }
    if integers:
        raise ValueError(
            f"its weights must be floating point numbers, got {next(iter(integers.values()))} for "
            f"{_listed(integers)} in {path.name}."
        )


def _listed(keys: Collection[Any], most: int = 3) -> str:
    # A mismatch is reported as a tuple of name and shapes.
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
