from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.devices import best_device, resolve_device


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("cpu_only")
def test_the_cpu_is_always_there() -> None:
    assert best_device() == "cpu"
    assert resolve_device() == torch.device("cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize(
    "device", ["cuda", "cuda:1", "mps", "meta", "xla", "gpu", "", "cuda:x", "cpu;", "cuda:-1"]
)
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ValueError, match=f"`device` must be .* got '{device}'"):
        resolve_device(device)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert best_device() == "cuda"
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="got 'cuda:2': torch finds 2 cuda devices"):
        resolve_device("cuda:2")


def test_mps_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == "mps"
    assert resolve_device("mps") == torch.device("mps")
