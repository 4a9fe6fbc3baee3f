"""`run.json`: how a run folder was generated, and whether new options match it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import read_json, write_atomically
from sd_tokenmerge.machine import processor_name
from sd_tokenmerge.sampling.locate import files_identity, locate_model, locate_part, split_lora
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import MAX_IMAGES, ImageJob

RUN_FILE = "run.json"
FORMAT = 2


class DescriptionError(ValueError):
    """A `run.json` that cannot be used.

    Attributes:
        problem: the file and what is wrong with it; the message adds what can be done.
    """

    def __init__(self, problem: str):
        self.problem = problem
        super().__init__(
            f"{problem}. The images beside it are untouched. Restore the file from a copy, or "
            f"generate all images again, with `overwrite` or in another `out`."
        )


@dataclass(frozen=True)
class Description:
    """How a run folder was generated.

    Attributes:
        options: of its first start; resolved.
        num_images: images of the run.
        plan_sha256: one hash over all seeds and prompts.
        model: hashes of the pipeline's, autoencoder's and LoRAs' files, and the LoRAs' scales.
        created: time of the first start, in ISO 8601.
        device: `"type"` and `"name"` of the device.
        versions: of the libraries.
        commit: of the checkout, with "+" if it was changed since; None without a checkout.
    """

    options: GenerateOptions
    num_images: int
    plan_sha256: str
    model: dict[str, Any]
    created: str
    device: dict[str, str]
    versions: dict[str, str]
    commit: str | None

    def to_json(self) -> dict[str, Any]:
        """The content of `run.json`."""
        rest = {name: getattr(self, name) for name in ("model", *_SURROUNDINGS)}
        plan = {"num_images": self.num_images, "sha256": self.plan_sha256}
        return {"format": FORMAT, "options": self.options.to_json(), "plan": plan, **rest}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Description:
        """The inverse of `to_json`.

        Raises:
            KeyError: a value is missing.
            TypeError: a value is of the wrong type.
            ValueError: an option is invalid, or the number of images contradicts the options.
        """
        rest = {name: values[name] for name in ("model", *_SURROUNDINGS)}
        new = cls(
            options=GenerateOptions.from_json(values["options"]),
            num_images=values["plan"]["num_images"],
            plan_sha256=values["plan"]["sha256"],
            **rest,
        )
        if type(new.num_images) is not int or not 0 < new.num_images <= MAX_IMAGES:
            raise ValueError(f"`num_images` must be in [1, {MAX_IMAGES}], got {new.num_images!r}.")
        classes, per_class = new.options.classes, new.options.images_per_class
        expected = new.num_images // per_class if classes is None else len(classes)
        if new.num_images != expected * per_class:
            raise ValueError(f"`num_images` must be {expected * per_class}, got {new.num_images}.")
        for name in ("model", "device", "versions"):
            if not isinstance(rest[name], dict):
                raise TypeError(f"`{name}` must be an object, got {rest[name]!r}.")
        new.options.compared()  # parses the method
        texts = [
            *(new.plan_sha256, new.model["pipeline"]["sha256"], new.created, new.commit or ""),
            *(new.device["type"], new.device["name"]),
            *(new.versions[name] for name in _PACKAGES),
        ]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"hashes, versions and the like must be texts, got {texts}.")
        return new


_PACKAGES = ("sd-tokenmerge", "torch", "diffusers", "transformers", "accelerate", "pillow")
_SURROUNDINGS = ("created", "device", "versions", "commit")
_MODEL_OPTIONS = {"pipeline": "model", "vae": "vae", "lora": "lora", "lora_scales": "lora"}


def describe_run(options: ResolvedOptions, jobs: Sequence[ImageJob]) -> Description:
    """Describe everything that determines the images of a run.

    Raises:
        ValueError: the model cannot be found.
    """
    return Description(
        options=options,
        num_images=len(jobs),
        plan_sha256=hashlib.sha256(json.dumps(jobs).encode()).hexdigest(),
        model={
            "pipeline": files_identity(locate_model(options)),
            "vae": _part_identity("vae", options.vae, options.local_files_only),
            "lora": [
                _part_identity("lora", split_lora(entry)[0], options.local_files_only)
                for entry in options.lora
            ],
            "lora_scales": [split_lora(entry)[1] for entry in options.lora],
        },
        **surroundings(options.device),
    )


def surroundings(device: str) -> dict[str, Any]:
    """The present time, device, library versions and commit.

    Args:
        device: torch device in use.
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
            **{name: version(name) for name in _PACKAGES},
        },
        "commit": _commit(),
    }


def read_description(folder: Path) -> Description | None:
    """The folder's `run.json`; None if there is none.

    Raises:
        DescriptionError: it is damaged or of another format.
        OSError: it cannot be read.
    """
    path = folder / RUN_FILE
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} is ").rstrip(".")
        if not path.read_bytes().strip():
            reason = "empty"
        raise _unusable(path, f"is damaged ({reason})") from error
    if not isinstance(content, dict):
        raise _unusable(path, "is damaged (no JSON object)")
    if content.get("format", FORMAT) != FORMAT:
        found = f"of format {content['format']}, where this one reads {FORMAT}"
        raise _unusable(path, f"was written by another version ({found})")
    try:
        return Description.from_json(content)
    except KeyError as error:
        raise _unusable(path, f"is damaged (without {error.args[0]})") from error
    except (TypeError, ValueError) as error:
        raise _unusable(path, f"is damaged ({error})") from error


def write_description(folder: Path, description: Description) -> None:
    """Write `run.json`."""
    data = json.dumps(description.to_json(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / RUN_FILE, data.encode())


def option_differences(old: Description, options: GenerateOptions) -> list[str]:
    """Differences in the options that determine the images, each as "name: old -> new"."""
    before, now = old.options.compared(), options.compared()
    return [
        f"{name}: {_show(before[name])} -> {_show(now[name])}"
        for name in now
        if name in before and before[name] != now[name]
    ]


def content_differences(old: Description, new: Description) -> list[str]:
    """Differences other than options: prompts, model files, kind of device."""
    found = [] if old.plan_sha256 == new.plan_sha256 else ["prompts: other content"]
    found += [
        f"{_MODEL_OPTIONS[part]}: other content"
        for part, content in new.model.items()
        if old.model.get(part) != content
    ]
    if old.device["type"] != new.device["type"]:
        found.append(f"device: {old.device['type']} -> {new.device['type']}")
    return found


def version_differences(old: Description, new: Description) -> list[str]:
    """Library versions that changed: images may differ by rounding, or by more."""
    return [
        f"{name} {old.versions.get(name)} -> {now}"
        for name, now in new.versions.items()
        if old.versions.get(name) != now
    ]


def _unusable(path: Path, problem: str) -> DescriptionError:
    return DescriptionError(f"{path} {problem}")


def _part_identity(argument: str, name: str | None, local_files_only: bool) -> Any:
    if name is None:
        return None
    return files_identity(locate_part(argument, name, local_files_only=local_files_only))


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" if it was changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "sd_tokenmerge")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
