from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sd_tokenmerge.fid.distance import Gaussian, squared_wasserstein
from sd_tokenmerge.fid.features import FeatureSet, FeatureSpace, extract_features
from sd_tokenmerge.fid.statistics import Statistics, load_statistics, save_statistics
from sd_tokenmerge.fid.storage import StorageError
from tests.fid.toy import toy_extractor


@pytest.fixture
def features(picture_set: Path) -> FeatureSet:
    return extract_features(picture_set, extractor=toy_extractor(), cache=False)


def test_ours_come_back_whole(features: FeatureSet, tmp_path: Path) -> None:
    path = tmp_path / "new" / "set.npz"
    save_statistics(features, path)
    loaded = load_statistics(path)
    assert isinstance(loaded, FeatureSet)
    assert torch.equal(loaded.features, features.features)
    assert (loaded.files, loaded.hashes) == (features.files, features.hashes)
    assert loaded.space == features.space
    assert list(path.parent.iterdir()) == [path]


def test_other_packages_can_read_ours(features: FeatureSet, tmp_path: Path) -> None:
    save_statistics(features, tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as archive:  # as pytorch-fid does
        mean, covariance = archive["mu"][:], archive["sigma"][:]
    values = features.features.double().numpy()
    assert np.allclose(mean, values.mean(0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_foreign_means_and_covariances(dtype: type, features: FeatureSet, tmp_path: Path) -> None:
    values = features.features.double().numpy()
    path = tmp_path / "foreign.npz"
    np.savez(
        path,
        mu=values.mean(0).astype(dtype),
        sigma=np.cov(values, rowvar=False).astype(dtype),
        mu_s=np.zeros(3),  # ADM's spatial statistics and image batch are not touched
        arr_0=np.array([object()]),
    )
    with pytest.raises(
        ValueError, match=r"does not say how its images were resized.*`assume_proto"
    ):
        load_statistics(path)
    loaded = load_statistics(path, assume_protocol="pytorch-fid")
    assert isinstance(loaded, Statistics)
    assert loaded.space == FeatureSpace("inception", "pytorch-fid", assumed=True)
    assert loaded.gaussian.num_images is None
    fitted = Gaussian.from_features(features.features)
    assert abs(squared_wasserstein(loaded.gaussian, fitted)) < 1e-5 * fitted.trace


def test_clean_fids_features(features: FeatureSet, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "kid.npz", feats=features.features.numpy())
    loaded = load_statistics(tmp_path / "kid.npz", assume_protocol="atc", assume_extractor="clip")
    assert isinstance(loaded, FeatureSet)
    assert torch.equal(loaded.features, features.features)
    assert loaded.space == FeatureSpace("clip", "atc", assumed=True)
    assert loaded.files == ()


def test_assumptions_are_for_foreign_files(features: FeatureSet, tmp_path: Path) -> None:
    save_statistics(features, tmp_path / "set.npz")
    load_statistics(tmp_path / "set.npz", assume_protocol="atc")
    with pytest.raises(ValueError, match=r"protocol atc, which contradicts .* 'pytorch-fid'"):
        load_statistics(tmp_path / "set.npz", assume_protocol="pytorch-fid")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="`protocol` must be one of"):
        load_statistics(tmp_path / "foreign.npz", assume_protocol="tf")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, mu=np.array([object()]), sigma=np.eye(3), allow_pickle=True)
    with pytest.raises(StorageError, match=r"evil\.npz' cannot be read.*allow_pickle"):
        load_statistics(path, assume_protocol="atc")


def test_files_that_are_none(features: FeatureSet, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    with pytest.raises(ValueError, match="does not exist"):
        load_statistics(path)
    path.write_bytes(b"")
    with pytest.raises(StorageError, match=r"set\.npz' cannot be read"):
        load_statistics(path)
    save_statistics(features, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StorageError, match=r"set\.npz' cannot be read"):
        load_statistics(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(StorageError, match="must hold `mu` and `sigma`, or `feats`, got none"):
        load_statistics(path, assume_protocol="atc")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(StorageError, match=r"must be an \.npz file with named arrays"):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, mu=np.zeros(3, dtype=int), sigma=np.eye(3))
    with pytest.raises(StorageError, match=r"`mu` in .* must be floating point, got int64"):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="must be finite"):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, metadata=np.array('{"format": "sd-tokenmerge statistics 1"}'))
    with pytest.raises(StorageError, match=r"set\.npz' is not complete"):
        load_statistics(path)
    np.savez(path, metadata=np.array('{"format": "sd-tokenmerge statistics 99"}'))
    with pytest.raises(StorageError, match="unknown format"):
        load_statistics(path)


def test_saving_is_checked(features: FeatureSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_statistics(features, tmp_path / "set.npy")
    one = FeatureSet(features.features[:1], ("a",), ("b",), features.space)
    with pytest.raises(ValueError, match="at least 2 images"):
        save_statistics(one, tmp_path / "one.npz")
    assert list(tmp_path.glob("*.np?")) == []
