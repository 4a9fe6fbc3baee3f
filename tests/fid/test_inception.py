from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sd_tokenmerge.fid.inception import FIDInceptionV3
from sd_tokenmerge.fid.inception_weights import WeightsError, load_inception
from tests.reference.fid_inception import random_state, slow_inception
from tests.stored_json import MANY


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state(0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def expected(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return slow_inception(state, images)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def test_state_dict_is_that_of_the_public_files() -> None:
    with torch.device("meta"):
        state = FIDInceptionV3().state_dict()
    assert len(state) == 566
    parameters = [v.numel() for k, v in state.items() if not k.endswith(NOT_PARAMETERS)]
    assert sum(parameters) == 23_850_960
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("layout", ["with counters", "without counters"])
def test_pth_files_give_the_slow_definition(
    layout: str,
    state: dict[str, torch.Tensor],
    images: torch.Tensor,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    kept = {
        name: tensor
        for name, tensor in state.items()
        if layout == "with counters" or not name.endswith("num_batches_tracked")
    }
    torch.save(kept, tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth")
    with torch.inference_mode():
        features = network(images)
    assert features.shape == (2, 2048)
    assert expected.std() > 0.01  # the random network does not collapse
    assert relative_error(features, expected) < 1e-4


def test_torchscript_gives_the_slow_definition(
    state: dict[str, torch.Tensor],
    images: torch.Tensor,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    save_torchscript(state, images[:1], path)
    network = load_inception(path)
    with torch.inference_mode():
        features = network(images)
    assert features.shape == (2, 2048)
    assert relative_error(features, expected) < 1e-4


def save_torchscript(state: dict[str, torch.Tensor], example: torch.Tensor, path: Path) -> None:
    """A file built like NVIDIA's: a network called `layers` inside a module that resizes."""

    class Outer(torch.nn.Module):
        def __init__(self, layers: torch.nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers((x - 128) / 128)

    network = FIDInceptionV3()
    network.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, the public file is not
        traced = torch.jit.trace(network.eval(), example)
        torch.jit.save(torch.jit.script(Outer(traced)), str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("Mixed_6b.branch1x1.bn.bias"),
            r"Missing key.*Mixed_6b\.branch1x1\.bn\.bias",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), "size mismatch for fc.weight"),
    ],
)
def test_other_state_dicts_are_refused(change, message: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = FIDInceptionV3().state_dict()
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message):
        load_inception(tmp_path / "weights.pth")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="not a readable state dict"):
        load_inception(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsError, match="not a readable state dict"):
        load_inception(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(WeightsError, match="must hold a state dict, got list"):
        load_inception(path)
    torch.save({1: torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="must hold a state dict: tensors by name"):
        load_inception(path)


@MANY
@given(data=st.binary(max_size=60) | st.sampled_from([b"", b"junk", b"PK\x03\x04"]))
@example(b"junk")
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(WeightsError):
        load_inception(tmp_path / "weights.pth")


class _Mischief:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"a": _Mischief(str(victim))}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="not a readable state dict"):
        load_inception(tmp_path / "weights.pth")
    assert not victim.exists()
