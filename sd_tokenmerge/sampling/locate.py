"""Find a model's files: a local folder, a local file, or the hub's cache. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import file_sha256, read_json_object
from sd_tokenmerge.hub import CHECKPOINT_SUFFIXES, is_hub_id, unreachable
from sd_tokenmerge.sampling.options import ResolvedOptions


def locate_model(options: ResolvedOptions) -> Path:
    """The diffusers folder or single-file checkpoint of `options.model`; a hub id is downloaded.

    Raises:
        ValueError: there is no such model, or the path holds something else.
    """
    from diffusers import DiffusionPipeline

    model = options.model

    def download() -> str:
        return str(
            DiffusionPipeline.download(
                model,
                revision=options.revision,
                variant=options.variant,
                local_files_only=options.local_files_only,
            )
        )

    path = _local_or_downloaded("model", model, download)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"`model` must be a diffusers folder (with a model_index.json), a checkpoint file or a "
            f"hub id, got the folder {model!r} without a model_index.json."
        )
    if path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(
            f"`model` must be a file that ends in {' or '.join(CHECKPOINT_SUFFIXES)}, "
            f"got {model!r}."
        )
    return path


def locate_part(argument: str, name: str, *, local_files_only: bool) -> Path:
    """The folder or file of an autoencoder or LoRA; a hub id is downloaded.

    Args:
        argument: the option's name, for messages.
        name: what the user gave.
        local_files_only: never access the hub.

    Raises:
        ValueError: there is no such file, folder or hub id.
    """

    def download() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors"], local_files_only=local_files_only
        )

    return _local_or_downloaded(argument, name, download)


def split_lora(entry: str) -> tuple[str, float]:
    """`"name@0.8"` as name and scale; the scale defaults to 1.

    Raises:
        ValueError: what follows the last `@` is not a finite number.
    """
    name, at, text = entry.rpartition("@")
    if not at:
        return entry, 1.0
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not isfinite(scale):
        raise ValueError(f"`lora` must be name@scale with a finite number, got {entry!r}.")
    return name, scale


def _local_or_downloaded(argument: str, name: str, download: Callable[[], str]) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not is_hub_id(name):
        raise ValueError(f"`{argument}` must exist, got {name!r}: no such file or folder.")
    try:
        return Path(download())
    except (OSError, ValueError) as error:
        raise unreachable(argument, name, error) from error


def files_identity(path: Path) -> dict[str, Any]:
    """The content of a model, independent of its location.

    For a diffusers folder, these are the files of the components that its model_index.json names;
    for any other folder, all configurations and weights in it.

    Returns:
        `"sha256"`, one hash over names and contents, and `"files"`, the hash of each.

    Raises:
        ValueError: the model_index.json is damaged.
    """
    if path.is_file():
        names = {path.suffix: path}  # a renamed checkpoint is the same model
    else:
        names = {str(file.relative_to(path).as_posix()): file for file in _model_files(path)}
    hashes = {name: _hash_once(file) for name, file in sorted(names.items())}
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return {"sha256": digest, "files": hashes}


def read_model_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a diffusers folder; its components are folders in this one.

    Raises:
        ValueError: it is damaged, or names a folder elsewhere.
        OSError: it cannot be read.
    """
    file = folder / "model_index.json"
    index = read_json_object(file)
    for name in index:
        if Path(name).name != name:
            raise ValueError(f"{file} must name folders beside it, got {name!r}.")
    return index


def _model_files(folder: Path) -> list[Path]:
    index = folder / "model_index.json"
    folders = [folder]
    if index.is_file():
        parts = read_model_index(folder)
        folders = [folder / name for name, value in parts.items() if isinstance(value, list)]
    suffixes = {".json", ".txt", ".model", ".safetensors", ".bin", ".ckpt"}
    found = [file for part in folders for file in part.rglob("*") if file.suffix in suffixes]
    return sorted(found + ([index] if index.is_file() else []))


def _hash_once(file: Path) -> str:
    status = file.stat()
    return _hash(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash(file: Path, size: int, modified_ns: int) -> str:
    return file_sha256(file)
