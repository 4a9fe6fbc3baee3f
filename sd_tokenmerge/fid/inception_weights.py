"""Find, download, check and load the public weights of the FID Inception network.

Searched in this order: the argument, the environment variable `SD_TOKENMERGE_INCEPTION`, torch's
hub cache (where pytorch-fid and torch-fidelity put them). Nothing is downloaded unless asked for.
State dicts are read with `weights_only=True`. A TorchScript file runs in torch's own interpreter,
after its checksum has been verified.
"""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_tokenmerge.fid.inception import NUM_FEATURES, FIDInceptionV3
from sd_tokenmerge.files import file_sha256, open_atomically

ENVIRONMENT_VARIABLE = "SD_TOKENMERGE_INCEPTION"


@dataclass(frozen=True)
class WeightFile:
    """A public file, identified by its `sha256` whatever its name."""

    name: str
    url: str
    sha256: str
    size_mb: float


_STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLIC_FILES = (
    WeightFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        _STATE_DICT_SHA256,
        95.6,
    ),
    WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        _STATE_DICT_SHA256,
        95.6,
    ),
    WeightFile(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
        "inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95.6,
    ),
)


class WeightsError(ValueError):
    """Network weights are missing or wrong; the message says what to do."""


def hub_folder() -> Path:
    """Where torch keeps downloaded weights: `$TORCH_HOME/hub/checkpoints`."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_inception_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """Find the weight file.

    Args:
        path: the file; None searches the environment variable and the hub cache.

    Raises:
        WeightsError: the named file does not exist, or nothing was found; the message says which
            file, where from, and where to put it.
    """
    for origin, named in (
        ("`weights`", path),
        (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or None),
    ):
        if named is not None:
            if not Path(named).is_file():
                raise WeightsError(
                    f"{origin} must name an existing file, got {os.fspath(named)!r}."
                )
            return Path(named)
    for file in PUBLIC_FILES:
        if (found := hub_folder() / file.name).is_file():
            return found
    first = PUBLIC_FILES[0]
    raise WeightsError(
        f"The Inception weights were not found: put {first.name} ({first.size_mb} MB, from "
        f"{first.url}) into {str(hub_folder())!r}, or name the file with `weights` or "
        f"${ENVIRONMENT_VARIABLE}, or let `download_weights` fetch it. "
        "(`extractor` efficientnet-lite0 needs no download.)"
    )


def download_inception_weights(file: WeightFile = PUBLIC_FILES[0]) -> Path:
    """Download the weights into torch's hub cache, unless they are there.

    The file appears under its name only if it is complete and its checksum is right.

    Raises:
        WeightsError: the server cannot be reached, or sent something else.
    """
    target = hub_folder() / file.name
    if target.is_file() and file_sha256(target) == file.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(target) as output:
            with urllib.request.urlopen(file.url, timeout=60) as response:
                shutil.copyfileobj(response, output)
            output.flush()
            if (digest := file_sha256(output.name)) != file.sha256:
                raise WeightsError(
                    f"{file.url} sent a file with sha256 {digest}, expected {file.sha256}; it was "
                    "not kept."
                )
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(
            f"{file.url} cannot be downloaded ({reason}); fetch it elsewhere and put it into "
            f"{str(hub_folder())!r}."
        ) from error
    return target


def verify_inception_weights(path: Path, *, allow_unknown: bool = False) -> str:
    """Hash a weight file and compare it with the public ones.

    Args:
        path: the file.
        allow_unknown: accept other weights; their FID is comparable with no published one.

    Returns:
        The file's sha256.

    Raises:
        WeightsError: it is not one of the public files, and `allow_unknown` is not set.
    """
    digest = file_sha256(path)
    if not allow_unknown and digest not in {file.sha256 for file in PUBLIC_FILES}:
        raise WeightsError(
            f"{str(path)!r} is not one of the public Inception files (its sha256 begins with "
            f"{digest[:8]}, expected {_STATE_DICT_SHA256[:8]} or {PUBLIC_FILES[2].sha256[:8]}): "
            "the download may be incomplete. `allow_unknown_weights` uses it anyway."
        )
    return digest


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a `.pth` file without unpickling anything but tensors.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{str(path)!r} is not a readable state dict: {reason}") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{str(path)!r} must hold a state dict, got {type(state).__name__}.")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise WeightsError(f"{str(path)!r} must hold a state dict: tensors by name.")
    return state


def load_inception(path: Path) -> nn.Module:
    """Build the network from a `.pth` state dict or clean-fid's TorchScript file.

    Call `verify_inception_weights` first: a TorchScript file is a program.

    Returns:
        A module in evaluation mode, `[B, 3, 299, 299]` in [-1, 1] to `[B, 2048]`.

    Raises:
        WeightsError: the file is damaged, or its parameters are not exactly those of the network.
    """
    if _is_torchscript(path):
        return _load_torchscript(path)
    state = read_state_dict(path)
    with torch.device("meta"):
        network = FIDInceptionV3()
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):  # not in every file, and not used in evaluation
            state.setdefault(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        details = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise WeightsError(
            f"{str(path)!r} does not fit the FID Inception network: {details[:300]}"
        ) from error
    network.to(torch.float32)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


class _TorchScriptInception(nn.Module):
    """clean-fid's use of NVIDIA's TorchScript file: its `layers`, without its own resizing."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.layers: nn.Module = script.layers  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 299, 299]` in [-1, 1] to `[B, 2048]`."""
        features: Tensor = self.layers(x)
        return features.reshape(x.shape[0], NUM_FEATURES)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torchscript(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is, this file is not
            script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise WeightsError(
            f"{str(path)!r} is not a readable TorchScript file: {str(error).splitlines()[0]}"
        ) from error
    if not hasattr(script, "layers"):
        raise WeightsError(
            f"{str(path)!r} must be clean-fid's TorchScript file, whose network is called `layers`."
        )
    return _TorchScriptInception(script).eval().requires_grad_(False)
