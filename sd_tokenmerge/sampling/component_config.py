"""Check the configuration of a pipeline's component before the component is built."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import read_json_object

_MAX_INTEGER = 1 << 20
"""Above every size and count of a network: a larger one would be allocated without end."""

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def require_config(component: Any, path: Path) -> None:
    """Refuse values that would fail only when images are generated, or never end.

    Values are compared with the defaults of a diffusers class: a text must not stand where the
    default is a number, nor a number where it is a text.

    Args:
        component: the component's class; None if unknown, which checks only sizes.
        path: its `config.json` or `scheduler_config.json`.

    Raises:
        ValueError: the file holds no JSON object, does not name the component's class, or holds a
            value of the wrong type or out of range.
        OSError: the file cannot be read.
    """
    config = read_json_object(path, minus_infinity=True)
    if component is not None and "_class_name" not in config:
        raise ValueError(
            f"`_class_name` in {path} must be a class, such as {component.__name__!r}, got none."
        )
    parameters = inspect.signature(component).parameters if component is not None else {}
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        if any(type(number) is int and abs(number) >= _MAX_INTEGER for number in numbers):
            raise ValueError(f"`{name}` in {path} must be below {_MAX_INTEGER:,}.")
        parameter = parameters.get(name)
        if parameter is not None and not _fits(value, parameter):
            default = parameter.default
            kind = "text" if isinstance(default, str) else "a number"
            raise ValueError(
                f"`{name}` in {path} must be {kind}, such as {default!r}, got {value!r}."
            )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTION_TYPES:
        raise ValueError(
            f"`prediction_type` in {path} must be one of {', '.join(_PREDICTION_TYPES)}, got "
            f"{prediction!r}."
        )


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    default, annotation = parameter.default, str(parameter.annotation)
    if isinstance(default, str):
        return not isinstance(value, bool | int | float)
    if isinstance(default, bool):
        return not isinstance(value, str)  # published configurations hold null
    if isinstance(default, int | float):
        if isinstance(value, list):
            return any(word in annotation.lower() for word in ("tuple", "list"))
        may_be_none = any(word in annotation for word in ("None", "Optional"))
        return isinstance(value, int | float) or (value is None and may_be_none)
    return True


def require_tokenizer(pipe: Any, suffix: str, folder: str) -> None:
    """Refuse a tokenizer that makes more tokens than its CLIP text encoder takes.

    Pipelines cut prompts to the tokenizer's length for CLIP, and to lengths of their own otherwise.

    Args:
        pipe: the pipeline.
        suffix: `""`, `"_2"` or `"_3"`: which of its tokenizers.
        folder: the pipeline's folder, for the message.

    Raises:
        ValueError: `model_max_length` is no integer, or larger than the text encoder's.
    """
    tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
    config = getattr(getattr(pipe, f"text_encoder{suffix}", None), "config", None)
    most = getattr(config, "max_position_embeddings", None)
    is_clip = str(getattr(config, "model_type", "")).startswith("clip")
    if tokenizer is None or most is None or not is_clip:
        return
    length = tokenizer.model_max_length
    if not isinstance(length, int) or not 1 <= length <= most:
        raise ValueError(
            f"`model_max_length` of {folder}/tokenizer{suffix}/tokenizer_config.json must be in "
            f"[1, {most}], the text encoder's length, got {length!r}."
        )
