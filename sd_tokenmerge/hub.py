"""Models by hub id: which names are ids, and their configurations. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_tokenmerge.files import read_json_object

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model on the hub, and of no local folder or file."""
    path = Path(name).expanduser()
    is_id = name.count("/") == 1 and name[0] not in "./~" and path.suffix not in CHECKPOINT_SUFFIXES
    return is_id and not path.exists()


def unreachable(argument: str, name: str, error: Exception, what: str = "") -> ValueError:
    """The error for a hub id whose files cannot be had.

    Args:
        argument: the option's name.
        name: the hub id.
        error: what the download raised.
        what: the files, such as `"its vae/config.json"`; default: the model.
    """
    reason = str(error).strip().splitlines()[0].partition(" (")[0].rstrip(".")
    return ValueError(
        f"`{argument}` {name!r} is not a local path, is not in the local hub cache, and "
        f"{f'{what} ' if what else ''}cannot be fetched ({reason}). Offline, give a local folder "
        f"or file, or fetch it beforehand with `hf download {name}`."
    )


def read_config(
    model: str, files: tuple[str, ...], *, revision: str | None, local_files_only: bool
) -> tuple[str, dict[str, Any]]:
    """The first of the files that a model has, and its content; no other file is downloaded.

    Args:
        model: diffusers folder, or hub id.
        files: paths in the folder, such as `"vae/config.json"`.
        revision: of a hub id.
        local_files_only: never access the hub.

    Raises:
        ValueError: the model has none of the files, or the first that it has is no JSON object.
    """
    names = " or ".join(files)
    if not is_hub_id(model):
        for file in files:
            path = Path(model).expanduser() / file
            if path.is_file():
                return file, read_json_object(path)
        raise ValueError(
            f"`model` must be a diffusers folder with a {names}, or a hub id, got {model!r}."
        )
    from huggingface_hub import hf_hub_download

    failures = []
    for file in files:
        try:
            downloaded = hf_hub_download(
                model, file, revision=revision, local_files_only=local_files_only
            )
        except (OSError, ValueError) as error:
            failures.append(error)
        else:
            return file, read_json_object(Path(downloaded))
    raise unreachable("model", model, failures[0], f"its {names}") from failures[0]
