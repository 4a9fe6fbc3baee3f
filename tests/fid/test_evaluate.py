from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_tokenmerge.fid.comparison import Comparison
from sd_tokenmerge.fid.distance import Gaussian, frechet_distance
from sd_tokenmerge.fid.evaluate import Evaluator, compare
from sd_tokenmerge.fid.features import FeatureSet, FeatureSpace, extract_features
from sd_tokenmerge.fid.jackknife import frechet_replicates, jackknife_error, make_groups
from sd_tokenmerge.fid.kid import kernel_distance, subset_kid
from sd_tokenmerge.fid.manifold import compare_manifolds
from sd_tokenmerge.fid.sources import load_set
from sd_tokenmerge.fid.statistics import Statistics, save_statistics
from tests.fid.toy import toy_extractor

SPACE = FeatureSpace("toy", "atc", "float32", "0" * 64)


def feature_set(
    num_images: int, seed: int, *, shift: float = 0.0, size: int = 12, space: FeatureSpace = SPACE
) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, size, generator=generator) * (1 + shift) + shift
    files = tuple(f"{index // 2}_{index % 2}.png" for index in range(num_images))
    hashes = tuple(f"{seed}-{shift}-{index}" for index in range(num_images))
    return FeatureSet(features, files, hashes, space)


REFERENCE = feature_set(100, 0)
GENERATED = feature_set(80, 1, shift=0.4)
BASELINE = feature_set(80, 1, shift=0.2)


def test_every_number_is_what_its_module_computes() -> None:
    result = compare(REFERENCE, GENERATED, baseline=BASELINE, manifold=True)
    reference = Gaussian.from_features(REFERENCE.features)
    groups = make_groups(GENERATED.files)
    assert groups is not None
    assert result.fid == frechet_distance(reference, Gaussian.from_features(GENERATED.features))
    replicates = frechet_replicates(GENERATED.features, reference, groups)
    unmerged = frechet_replicates(BASELINE.features, reference, groups)
    assert result.fid_se == jackknife_error(result.fid, replicates, groups)
    assert result.kid == pytest.approx(kernel_distance(GENERATED.features, REFERENCE.features))
    assert result.manifold == compare_manifolds(GENERATED.features, REFERENCE.features)
    assert result.delta is not None
    assert result.delta.fid == pytest.approx(result.fid - compare(REFERENCE, BASELINE).fid)
    difference = replicates - unmerged
    assert result.delta.fid_se == jackknife_error(result.delta.fid, difference, groups)
    assert result.delta.significant
    assert (result.num_reference, result.num_generated, result.num_features) == (100, 80, 12)
    assert (result.extractor, result.protocol, result.precision) == ("toy", "atc", "float32")
    assert result.groups == "20 groups of classes"
    assert result.warnings == ()


def test_the_baseline_against_itself_is_no_difference() -> None:
    delta = compare(REFERENCE, BASELINE, baseline=BASELINE).delta
    assert delta is not None
    assert (delta.fid, delta.fid_se, delta.kid, delta.kid_se) == (0, 0, 0, 0)
    assert delta.significant is False


def test_results_are_json() -> None:
    values = json.loads(json.dumps(compare(REFERENCE, GENERATED, baseline=BASELINE).to_dict()))
    assert values["fid"] > 0
    assert values["delta"]["significant"] is True
    assert set(values) == set(Comparison.__dataclass_fields__)


def test_an_evaluator_measures_each_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(a: Gaussian, b: Gaussian) -> float:
        calls.append(1)
        return frechet_distance(a, b)

    monkeypatch.setattr("sd_tokenmerge.fid.evaluate.frechet_distance", counted)
    evaluator = Evaluator(REFERENCE)
    for shift in (0.3, 0.4, 0.5):
        result = evaluator.compare(feature_set(80, 1, shift=shift), baseline=BASELINE)
        alone = compare(REFERENCE, feature_set(80, 1, shift=shift), baseline=BASELINE)
        assert (result.fid, result.fid_se, result.delta) == (alone.fid, alone.fid_se, alone.delta)
    assert len(calls) == 4 + 6


def test_a_baseline_of_another_size_is_refused_unless_forced() -> None:
    other = feature_set(70, 1)
    with pytest.raises(ValueError, match=r"as many images as the generated set, got 70 and 80.*`f"):
        compare(REFERENCE, GENERATED, baseline=other)
    forced = compare(REFERENCE, GENERATED, baseline=other, force=True)
    assert forced.delta is not None
    assert forced.delta.num_baseline == 70
    assert forced.delta.fid_se is None
    assert forced.delta.significant is None
    assert "baseline: 70 images against 80; the difference is biased." in forced.warnings


def test_a_baseline_of_other_names_is_refused_unless_forced() -> None:
    renamed = FeatureSet(
        BASELINE.features, tuple(f"x{f}" for f in BASELINE.files), BASELINE.hashes, SPACE
    )
    with pytest.raises(ValueError, match="same file names as the generated set"):
        compare(REFERENCE, GENERATED, baseline=renamed)
    forced = compare(REFERENCE, GENERATED, baseline=renamed, force=True)
    assert forced.delta is not None
    assert forced.delta.fid_se is None


def test_different_features_are_refused() -> None:
    other = feature_set(80, 1, space=FeatureSpace("toy", "pytorch-fid", "float32", "0" * 64))
    with pytest.raises(ValueError, match="different features"):
        compare(REFERENCE, other)
    with pytest.raises(ValueError, match="different features"):
        compare(REFERENCE, GENERATED, baseline=other)


def test_statistics_without_features_have_a_distance_only(tmp_path: Path) -> None:
    values = REFERENCE.features.double().numpy()
    np.savez(tmp_path / "r.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    generated = FeatureSet(
        GENERATED.features, GENERATED.files, GENERATED.hashes, FeatureSpace("inception", "atc")
    )
    result = compare(tmp_path / "r.npz", generated, assume_protocol="atc")
    assert result.fid == pytest.approx(compare(REFERENCE, GENERATED).fid, rel=1e-9)
    assert result.fid_se is not None
    assert result.kid is None
    assert result.num_reference is None
    assert result.assumed
    assert result.warnings == (
        "reference: extractor and protocol are assumed: the file does not record them.",
    )
    loaded = load_set(tmp_path / "r.npz", assume_protocol="atc")
    assert isinstance(loaded, Statistics)
    backwards = compare(generated, loaded)
    assert backwards.fid == pytest.approx(result.fid, rel=1e-9)
    assert backwards.fid_se is None
    with pytest.raises(ValueError, match="`manifold` needs features"):
        compare(generated, loaded, manifold=True)


def test_few_images_have_no_error_and_a_warning() -> None:
    result = compare(feature_set(10, 0), feature_set(30, 1))
    assert result.fid_se is None
    assert result.kid is not None
    assert result.groups is None
    assert [warning.split(" images")[0] for warning in result.warnings] == ["reference: 10"]


def test_subsets_are_an_option() -> None:
    result = compare(REFERENCE, GENERATED, kid_subset_size=50)
    assert result.kid_subsets == subset_kid(GENERATED.features, REFERENCE.features, subset_size=50)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["kid_subsets"] == {"mean": result.kid_subsets[0], "std": result.kid_subsets[1]}
    with pytest.raises(ValueError, match=r"`kid_subset_size` must be in \[2, 80\], got 1000"):
        compare(REFERENCE, GENERATED, kid_subset_size=1000)
    with pytest.raises(ValueError, match="`manifold` needs at least 6 images in each set, got 5"):
        compare(REFERENCE, feature_set(5, 1), manifold=True)


def test_a_reference_of_one_image_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="`reference` must hold at least 2 images, got 1"):
        Evaluator(feature_set(1, 0))


def test_what_is_not_asked_for_is_not_computed() -> None:
    result = compare(REFERENCE, GENERATED, standard_error=False, kid=False)
    assert (result.fid_se, result.kid, result.kid_se, result.manifold) == (None, None, None, None)


def test_folders_and_saved_statistics_give_the_same(picture_set: Path, tmp_path: Path) -> None:
    extractor = toy_extractor()
    other = tmp_path / "other"
    shutil.copytree(picture_set, other)
    (other / "0_0.png").unlink()
    shutil.copy(other / "0_1.png", other / "0_0.png")
    from_folders = compare(picture_set, other, extractor=extractor)
    save_statistics(extract_features(picture_set, extractor=extractor), tmp_path / "r.npz")
    from_file = compare(tmp_path / "r.npz", other, extractor=extractor)
    assert from_file.fid == from_folders.fid
    assert from_file.kid == from_folders.kid
    assert from_folders.warnings == (
        "generated: 1 of 48 images have the same bytes as another "
        "(the first pair is '0_0.png' and '0_1.png').",
    )
