"""What the installed diffusers has: pipelines with a UNet, and attention processors.

Read from source text, because modules whose optional requirements are missing can't be imported.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers

FOLDER = Path(diffusers.__file__).parent
SHARED_PROCESSORS = "diffusers.models.attention_processor"


@cache
def unet_pipelines() -> dict[str, str]:
    """The module of every pipeline class with a UNet among its components, by class name."""
    return {
        name: module.name
        for module in pkgutil.walk_packages([str(FOLDER / "pipelines")], "diffusers.pipelines.")
        if not module.ispkg
        for name, found in _classes(module.name).items()
        if "Pipeline" in name and _takes_unet(found)
    }


@cache
def attention_processors() -> dict[str, str]:
    """The module of every attention processor that a UNet might have, by class name.

    Those that all models share, and those that pipelines with a UNet bring along.
    """
    return {
        name: module
        for module in (*sorted(set(unet_pipelines().values())), SHARED_PROCESSORS)
        for name in _classes(module)
        if name.endswith(("AttnProcessor", "AttnProcessor2_0", "NPU", "StoreProcessor"))
    }


def find_class(name: str) -> Any:
    """A pipeline or processor by name.

    Raises:
        ImportError: an optional requirement is missing.
    """
    module = (unet_pipelines() | attention_processors())[name]
    return getattr(importlib.import_module(module), name)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    file = FOLDER.joinpath(*module.split(".")[1:]).with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    is_relevant = "unet" in text or module == SHARED_PROCESSORS
    body = ast.parse(text).body if is_relevant else []
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _takes_unet(pipeline: ast.ClassDef) -> bool:
    for node in pipeline.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return any(argument.arg.endswith("unet") for argument in node.args.args)
    return False
