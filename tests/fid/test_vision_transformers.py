from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_tokenmerge.fid.extractors import find_extractor
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.images import read_image
from sd_tokenmerge.fid.inception_weights import WeightsError
from sd_tokenmerge.fid.preprocess import PROTOCOLS

ATC = PROTOCOLS["atc"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of the real classes, saved as on the hub."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
    )

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vision = {**SMALL, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    text = {**SMALL, "num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "projection_dim": 20}, projection_dim=20
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPVisionModelWithProjection(config.vision_config).save_pretrained(folder / "clip-vision")
    dinov2 = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    return folder


def test_clip_features_are_the_projected_image_embedding(models: Path, picture_set: Path) -> None:
    from transformers import CLIPModel

    result = extract_features(picture_set, extractor="clip", weights=models / "clip", cache=False)
    assert result.features.shape == (48, 20)
    pixels = ATC.resize(read_image(picture_set / result.files[5]), 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    model = CLIPModel.from_pretrained(models / "clip").eval()
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=((pixels / 255 - mean) / std)[None])
        expected = model.visual_projection(vision.pooler_output)
    assert torch.allclose(result.features[5], expected[0], atol=1e-4)


def test_vision_only_checkpoints_work(models: Path, picture_set: Path) -> None:
    extractor = find_extractor("clip", ATC, models / "clip-vision")
    assert (extractor.image_size, extractor.num_features) == (32, 20)
    assert extractor.load()(torch.zeros(2, 3, 32, 32)).shape == (2, 20)


def test_dinov2_features_are_the_class_token(models: Path, picture_set: Path) -> None:
    from transformers import Dinov2Model

    result = extract_features(
        picture_set, extractor="dinov2", weights=models / "dinov2", cache=False
    )
    assert result.features.shape == (48, 32)
    pixels = ATC.resize(read_image(picture_set / result.files[5]), 224)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = Dinov2Model.from_pretrained(models / "dinov2").eval()
    with torch.inference_mode():
        output = model(pixel_values=((pixels / 255 - mean) / std)[None])
    assert torch.allclose(result.features[5], output.last_hidden_state[0, 0], atol=1e-4)


def test_other_weights_are_another_space(models: Path, tmp_path: Path) -> None:
    first = find_extractor("dinov2", ATC, models / "dinov2")
    other = copy_model(models / "dinov2", tmp_path / "other")
    assert find_extractor("dinov2", ATC, other).weights_sha256 == first.weights_sha256
    state = load_file(other / "model.safetensors")
    state["layernorm.bias"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    assert find_extractor("dinov2", ATC, other).weights_sha256 != first.weights_sha256


def test_missing_parameters_are_not_drawn_at_random(models: Path, tmp_path: Path) -> None:
    for name, lost in (("clip", "visual_projection.weight"), ("dinov2", "layernorm.bias")):
        other = copy_model(models / name, tmp_path / name)
        state = load_file(other / "model.safetensors")
        del state[lost]
        save_file(state, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=rf"lacks 1 parameters, the first being.*{lost}"):
            find_extractor(name, ATC, other).load()


def test_other_models_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="must hold a CLIP model, got 'dinov2'"):
        find_extractor("clip", ATC, models / "dinov2")
    with pytest.raises(WeightsError, match="must hold a DINOv2 model, got 'clip'"):
        find_extractor("dinov2", ATC, models / "clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match=r"must hold config\.json and safetensors weights"):
        find_extractor("clip", ATC, tmp_path)


def test_models_that_are_not_here_are_not_fetched() -> None:
    with pytest.raises(WeightsError, match=r"'nobody/nothing' was not found.*`download_weights`"):
        find_extractor("clip", ATC, "nobody/nothing")


def copy_model(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
