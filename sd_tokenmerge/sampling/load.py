"""Load the pipeline that the options describe, through diffusers' own loaders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from sd_tokenmerge.devices import resolve_device
from sd_tokenmerge.hub import read_config
from sd_tokenmerge.network_size import limited_size
from sd_tokenmerge.patching.outline import Outline, load_outline
from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.sampling.attention import set_attention
from sd_tokenmerge.sampling.component_config import require_config, require_tokenizer
from sd_tokenmerge.sampling.locate import (
    locate_model,
    locate_part,
    read_model_index,
    split_lora,
)
from sd_tokenmerge.sampling.networks import (
    DTYPE_ARGUMENT,
    load_network,
    network_class,
    refuse_integers,
    require_complete,
    require_finite,
)
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.pipelines import require_pipeline
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.single_file import holds_sdxl, missing_weights, published_model

_NETWORKS_OF_FILES: dict[Literal["unet", "vae"], Any] = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}


def load_pipeline(options: GenerateOptions) -> Any:
    """A pipeline, on its device, ready to be patched.

    Args:
        options: only the model's options are used; None means the same as in `resolve_options`.

    Returns:
        A diffusers text-to-image pipeline with a UNet or a transformer.

    Raises:
        ValueError: the model is missing or damaged, or an option does not fit it.
    """
    resolved = resolve_options(options)
    resolve_device(resolved.device)  # torch reports a bad device less clearly, and late
    path = locate_model(resolved)
    dtype = getattr(torch, resolved.dtype)
    if path.is_dir():
        pipe = _load_folder(path, resolved, dtype)
    else:
        pipe = _load_file(path, resolved, dtype)
    for suffix in ("", "_2", "_3"):
        require_tokenizer(pipe, suffix, resolved.model)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, resolved.scheduler)
    _set_vae(pipe, resolved, dtype)
    _add_loras(pipe, resolved)
    _place(pipe, resolved)
    set_attention(pipe, resolved.attention_backend, resolved.device)
    if resolved.compile:
        find_denoiser(pipe).compile()
    return pipe


def _load_folder(path: Path, options: ResolvedOptions, dtype: torch.dtype) -> Any:
    index = read_model_index(path)
    require_pipeline(index, path, options)
    with _loading("model", options.model):
        # Stable Diffusion 1 and 2 and HunyuanDiT take a safety checker.
        checker: dict[str, Any] = {}
        if "safety_checker" in index and not options.safety_checker:
            checker = {"safety_checker": None, "requires_safety_checker": False}
        classes = {
            name: network_class(*entry)
            for name, entry in index.items()
            if isinstance(entry, list) and None not in entry and name not in checker
        }
    networks = {}
    for name, cls in classes.items():
        if cls is not None:
            with _loading("model", f"{options.model}/{name}"):
                networks[name] = load_network(cls, path / name, dtype, options.variant)
    with _loading("model", options.model):
        return diffusers.DiffusionPipeline.from_pretrained(
            path,
            variant=options.variant,
            local_files_only=True,
            **{DTYPE_ARGUMENT: dtype},
            **checker,
            **networks,
        )


def _load_file(path: Path, options: ResolvedOptions, dtype: torch.dtype) -> Any:
    if options.safety_checker:
        raise ValueError("`safety_checker` must be off for a single-file checkpoint, got on.")
    with _loading("model", options.model):
        is_sdxl = holds_sdxl(path)
        if path.suffix == ".safetensors":
            refuse_integers(path)
    cls = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    checker = {} if is_sdxl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _loading("model", options.model), limited_size(path.stat().st_size):
            pipe = cls.from_single_file(
                str(path),
                config=options.model_config,
                local_files_only=options.local_files_only,
                **{DTYPE_ARGUMENT: dtype},
                **checker,
            )
    except ValueError as error:
        if options.model_config is None and isinstance(error.__cause__, OSError):
            raise _unreachable_hub(options.model) from error
        _require_all_weights(path, options)
        raise
    with _loading("model", options.model):
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                require_finite(component)
    return pipe


def _require_all_weights(path: Path, options: ResolvedOptions) -> None:
    """Name missing weights of a checkpoint that can't be loaded, as diffusers' error does not.

    Raises:
        ValueError: weights of the UNet or the autoencoder are missing.
    """
    found = []
    with suppress(Exception):  # something else is wrong, and diffusers' error may say what
        source = options.model_config or published_model(path)
        for slot, cls in _NETWORKS_OF_FILES.items():
            _, config = read_config(
                source,
                (f"{slot}/config.json",),
                revision=None,
                local_files_only=options.local_files_only,
            )
            with torch.device("meta"), limited_size():
                network = cls.from_config(config)
            found.append((network, missing_weights(path, slot, network)))
    with _loading("model", options.model):
        for network, missing in found:
            require_complete(network, missing)


def load_model_outline(
    model: str,
    *,
    model_config: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Outline:
    """The denoiser of a model without its weights; see `load_outline`.

    Args:
        model: diffusers folder, hub id or single-file checkpoint.
        model_config: diffusers folder with the configurations of a single-file checkpoint; None:
            those of the published model that diffusers takes the checkpoint for.
        revision: of a hub id.
        local_files_only: never access the hub.

    Raises:
        ValueError: there is no such model, it is damaged, or no block could be merged.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        return load_outline(model, revision=revision, local_files_only=local_files_only)
    if model_config is not None:
        return load_outline(model_config)
    with _loading("model", model):
        published = published_model(path)
    try:
        return load_outline(published, local_files_only=local_files_only)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _unreachable_hub(model) from error


def _unreachable_hub(checkpoint: str) -> ValueError:
    return ValueError(
        f"`model` {checkpoint!r} is a single file; its configurations and tokenizer come from the "
        "hub, which cannot be reached. Offline, give a folder with them as `model_config`."
    )


@contextmanager
def _loading(argument: str, name: str) -> Iterator[None]:
    """Report what the loaders raise about damaged files as one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the loaders raise a dozen types on damaged files
        reason = _first_line(error)
        raise ValueError(f"`{argument}` {name!r} cannot be loaded: {reason}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Replace a pipeline's scheduler, with the settings of the one before; None keeps it.

    Raises:
        ValueError: there is no scheduler of that name that can replace it.
    """
    if name is None:
        return
    compatible = {cls.__name__: cls for cls in pipe.scheduler.compatibles}
    full_name = name if name.endswith("Scheduler") else f"{name}Scheduler"
    if full_name not in compatible:
        choices = ", ".join(sorted(key.removesuffix("Scheduler") for key in compatible))
        raise ValueError(f"`scheduler` must be one of {choices}, got {name!r}.")
    pipe.scheduler = compatible[full_name].from_config(pipe.scheduler.config)


def _set_vae(pipe: Any, options: ResolvedOptions, dtype: torch.dtype) -> None:
    if options.vae is None:
        return
    path = locate_part("vae", options.vae, local_files_only=options.local_files_only)
    if not (path / "config.json").is_file():
        raise ValueError(f"`vae` must be a folder with a config.json, got {options.vae!r}.")
    with _loading("vae", options.vae):
        name = str(diffusers.AutoencoderKL.load_config(path).get("_class_name", "no class"))
    if not name.startswith("Autoencoder"):
        raise ValueError(f"`vae` must be an autoencoder, got {name} in {path}.")
    require_config(getattr(diffusers, name, None), path / "config.json")
    with _loading("vae", options.vae):
        pipe.vae = load_network(getattr(diffusers, name), path, dtype)


def _add_loras(pipe: Any, options: ResolvedOptions) -> None:
    scales = []
    for index, entry in enumerate(options.lora):
        name, scale = split_lora(entry)
        path = locate_part("lora", name, local_files_only=options.local_files_only)
        file = _only_weights(path) if path.is_dir() else path
        with _loading("lora", name):
            pipe.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=f"lora{index}",
                local_files_only=True,
            )
            pipe.set_adapters(f"lora{index}")  # fails if nothing in the file was for this model
        scales.append(scale)
    if scales:
        pipe.set_adapters([f"lora{index}" for index in range(len(scales))], scales)


def _only_weights(folder: Path) -> Path:
    files = list(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"`lora` must be a .safetensors file or a folder with one, got {str(folder)!r} with "
            f"{len(files)}."
        )
    return files[0]


def _place(pipe: Any, options: ResolvedOptions) -> None:
    try:
        if options.offload == "none":
            pipe.to(options.device)
        elif options.offload == "model":
            pipe.enable_model_cpu_offload(device=options.device)
        else:
            pipe.enable_sequential_cpu_offload(device=options.device)
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = _first_line(error)
        raise ValueError(f"`device` {options.device!r} cannot be used: {reason}") from error
