"""`run.json`: what a run folder was made with, and whether new options fit it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import write_atomically
from sd_tokenmerge.machine import processor_name
from sd_tokenmerge.sampling.locate import files_identity, locate_model, locate_part, split_lora
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob

RUN_FILE = "run.json"
FORMAT = 1

Description = dict[str, Any]

_NEEDED = (
    *("options.model", "options.method", "options.keep_rate", "options.batch_size"),
    *("plan.num_images", "plan.sha256"),
    *("model.pipeline.sha256", "model.vae", "model.lora", "model.lora_scales"),
    *("device.type", "device.name", "versions.torch", "commit"),
)
"""What is read from a `run.json`, besides the options that are compared."""


class DescriptionError(ValueError):
    """A `run.json` that cannot be used."""


def unusable(path: Path, problem: str) -> DescriptionError:
    """The error that says so.

    Args:
        path: the `run.json`.
        problem: what follows its name, such as "is damaged".
    """
    return DescriptionError(
        f"{path} {problem}. The images beside it are untouched. Restore the file from a copy, or "
        f"make all images anew: with `overwrite`, or in another `out`."
    )


def describe_run(options: ResolvedOptions, jobs: Sequence[ImageJob]) -> Description:
    """Everything that is needed to tell whether another start would make the same images.

    Raises:
        ValueError: the model cannot be found.
    """
    return {
        "format": FORMAT,
        "options": options.to_json(),
        "plan": {"num_images": len(jobs), "sha256": plan_sha256(jobs)},
        "model": {
            "pipeline": files_identity(locate_model(options)),
            "vae": _part_identity("vae", options.vae, options.local_files_only),
            "lora": [
                _part_identity("lora", split_lora(entry)[0], options.local_files_only)
                for entry in options.lora
            ],
            "lora_scales": [split_lora(entry)[1] for entry in options.lora],
        },
        **surroundings(options.device),
    }


def surroundings(device: str) -> Description:
    """When, on what, and by which versions something is made.

    Args:
        device: torch device that it is made on.
    """
    import torch

    kind = torch.device(device).type
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {
            "type": kind,
            "name": torch.cuda.get_device_name(device) if kind == "cuda" else processor_name(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("sd-tokenmerge", "torch", "diffusers")},
            **{name: version(name) for name in ("transformers", "accelerate", "pillow")},
        },
        "commit": _commit(),
    }


def plan_sha256(jobs: Sequence[ImageJob]) -> str:
    """One hash over all files, seeds and prompts."""
    return hashlib.sha256(json.dumps(jobs).encode()).hexdigest()


def read_description(folder: Path) -> Description | None:
    """The folder's `run.json`; None where there is none.

    Raises:
        DescriptionError: it is damaged or of another format.
    """
    path = folder / RUN_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        is_empty = isinstance(error, json.JSONDecodeError) and not error.doc.strip()
        reason = "empty" if is_empty else f"no JSON: {error}"
        raise unusable(path, f"is damaged ({reason})") from error
    if not isinstance(description, dict):
        raise unusable(path, "is damaged (no JSON object)")
    if description.get("format", FORMAT) != FORMAT:
        version = f"of format {description['format']}, where this one reads {FORMAT}"
        raise unusable(path, f"was written by another version ({version})")
    missing = [name for name in ("format", *_NEEDED) if not _has(description, name.split("."))]
    if missing:
        raise unusable(path, f"is damaged (without {', '.join(missing)})")
    return description


def _has(value: Any, path: Sequence[str]) -> bool:
    """Whether a JSON value has something at the end of a path of names."""
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def write_description(folder: Path, description: Description) -> None:
    """Write `run.json`."""
    data = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / RUN_FILE, data.encode())


def option_differences(old: Description, options: ResolvedOptions) -> list[str]:
    """What differs in the options that make the images, each as "name: old -> new"."""
    old_options, new_options = old["options"], options.compared()
    return [
        f"{name}: {_show(old_options.get(name))} -> {_show(value)}"
        for name, value in new_options.items()
        if old_options.get(name) != value
    ]


def content_differences(old: Description, new: Description) -> list[str]:
    """What differs besides the options: prompts, model files, kind of device."""
    pairs = {
        "prompts": [side["plan"]["sha256"] for side in (old, new)],
        "model": [side["model"]["pipeline"]["sha256"] for side in (old, new)],
        "vae": [(side["model"]["vae"] or {}).get("sha256") for side in (old, new)],
        "lora": [
            [part["sha256"] for part in side["model"]["lora"]] + side["model"]["lora_scales"]
            for side in (old, new)
        ],
    }
    found = [f"{name}: other content" for name, (was, now) in pairs.items() if was != now]
    if old["device"]["type"] != new["device"]["type"]:
        found.append(f"device: {old['device']['type']} -> {new['device']['type']}")
    return found


def version_differences(old: Description, new: Description) -> list[str]:
    """Library versions that changed: images may differ by rounding, or by more."""
    return [
        f"{name} {old['versions'].get(name)} -> {value}"
        for name, value in new["versions"].items()
        if old["versions"].get(name) != value
    ]


def _part_identity(argument: str, name: str | None, local_files_only: bool) -> Any:
    if name is None:
        return None
    return files_identity(locate_part(argument, name, local_files_only=local_files_only))


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" if it was changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", "sd_tokenmerge"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
