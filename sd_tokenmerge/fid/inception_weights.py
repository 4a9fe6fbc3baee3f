"""Find, download, check and load the public weights of the FID Inception network.

Searched in this order: the argument, the environment variable `SD_TOKENMERGE_INCEPTION`, torch's
hub cache (where pytorch-fid and torch-fidelity put them). Nothing is downloaded unless asked for.
State dicts are read with `weights_only=True`; a TorchScript file runs in torch's own interpreter,
and only after its checksum was verified.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_tokenmerge.fid.inception import NUM_FEATURES, FIDInceptionV3
from sd_tokenmerge.files import file_sha256

ENVIRONMENT_VARIABLE = "SD_TOKENMERGE_INCEPTION"


@dataclass(frozen=True)
class WeightFile:
    """A public file: `sha256` identifies it whatever it is called."""

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


def download_inception_weights(
    progress: Callable[[int, int], None] | None = None, *, file: WeightFile = PUBLIC_FILES[0]
) -> Path:
    """Download the weights into torch's hub cache, unless they are there.

    The file appears under its name only when it is complete and its checksum is right.

    Args:
        progress: called with (bytes so far, bytes in all or 0).
        file: which public file.

    Raises:
        WeightsError: the server cannot be reached, or sent something else.
    """
    target = hub_folder() / file.name
    if target.is_file() and file_sha256(target) == file.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    try:
        digest = hashlib.sha256()
        with (
            os.fdopen(descriptor, "wb") as output,
            urllib.request.urlopen(file.url, timeout=60) as response,
        ):
            total = int(response.headers.get("Content-Length") or 0)
            received = 0
            while block := response.read(1 << 20):
                output.write(block)
                digest.update(block)
                received += len(block)
                if progress is not None:
                    progress(received, total)
        if digest.hexdigest() != file.sha256:
            raise WeightsError(
                f"{file.url} sent {received} bytes with sha256 {digest.hexdigest()}, expected "
                f"{file.sha256}; nothing was kept."
            )
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(
            f"{file.url} cannot be downloaded ({reason}); fetch it elsewhere and put it into "
            f"{str(hub_folder())!r}."
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def verify_inception_weights(path: Path, *, allow_unknown: bool = False) -> str:
    """Hash a weight file and compare it with the public ones.

    Args:
        path: the file.
        allow_unknown: accept other weights; their FID is comparable with no published one.

    Returns:
        The file's sha256.

    Raises:
        WeightsError: it is none of the public files (and `allow_unknown` is not set).
    """
    digest = file_sha256(path)
    if not allow_unknown and digest not in {file.sha256 for file in PUBLIC_FILES}:
        raise WeightsError(
            f"{str(path)!r} is none of the public Inception files (its sha256 begins with "
            f"{digest[:8]}, expected {_STATE_DICT_SHA256[:8]} or {PUBLIC_FILES[2].sha256[:8]}): "
            "the download may be incomplete. `allow_unknown_weights` uses it nevertheless."
        )
    return digest


def load_inception(path: Path) -> nn.Module:
    """Build the network from a `.pth` state dict or clean-fid's TorchScript file.

    Call `verify_inception_weights` first.

    Returns:
        A module in evaluation mode, `[B, 3, 299, 299]` in [-1, 1] to `[B, 2048]`.

    Raises:
        WeightsError: the file is damaged, or its parameters are not exactly those of the network.
    """
    if _is_torchscript(path):
        return _load_torchscript(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{str(path)!r} is not a readable state dict: {reason}") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{str(path)!r} must hold a state dict, got {type(state).__name__}.")
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
