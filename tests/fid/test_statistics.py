from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from sd_tokenmerge.fid.distance import Gaussian, frechet_distance
from sd_tokenmerge.fid.features import FeatureSet, FeatureSpace, extract_features
from sd_tokenmerge.fid.statistics import Statistics, load_statistics, save_statistics
from sd_tokenmerge.fid.storage import StorageError
from tests.fid.toy import toy_extractor

GOOD = FeatureSet(
    torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    tuple("abcd"),
    tuple("efgh"),
    FeatureSpace("toy", "atc", weights_sha256="0" * 64),
)


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
    assert abs(frechet_distance(loaded.gaussian, fitted)) < 1e-5 * fitted.trace


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
    with pytest.raises(StorageError, match=r"evil\.npz' cannot be read.*got object"):
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
    with pytest.raises(StorageError, match=r"File is not a zip file"):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, mu=np.zeros(3, dtype=int), sigma=np.eye(3))
    with pytest.raises(
        StorageError, match=r"`mu` must be float16, float32, float64 or text, got int64"
    ):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="must be finite"):
        load_statistics(path, assume_protocol="atc")
    np.savez(path, metadata=np.array('{"format": "sd-tokenmerge statistics 1"}'))
    with pytest.raises(StorageError, match=r"set\.npz' is damaged or incomplete: 'space'"):
        load_statistics(path)
    np.savez(path, metadata=np.array('{"format": "sd-tokenmerge statistics 99"}'))
    with pytest.raises(StorageError, match="unknown format"):
        load_statistics(path)


def test_big_endian_and_fortran_order_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 6))
    mean, covariance = values.mean(0), np.cov(values, rowvar=False)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "b.npz", mu=mean.astype(">f8"), sigma=np.asfortranarray(covariance))
    a, b = (load_statistics(tmp_path / name, assume_protocol="atc") for name in ("a.npz", "b.npz"))
    assert isinstance(a, Statistics)
    assert isinstance(b, Statistics)
    assert torch.equal(a.gaussian.mean, b.gaussian.mean)
    assert torch.equal(a.gaussian.factor, b.gaussian.factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": np.array(["a", "b"])}, "2 different names and 48 hashes"),
        ({"hashes": np.array(["a"])}, "48 different names and 1 hashes"),
        ({"files": np.array(["a"] * 48)}, "1 different names"),
        ({"files": np.arange(48.0)}, "must be lists of text, got float64"),
        ({"files": np.array("a")}, "must be lists of text"),
        ({"features": np.array(["a"] * 48)}, "must be floating point, got <U1"),
        ({"features": np.zeros((48, 0))}, "must be \\[N, D\\]"),
        ({"features": np.zeros((1, 4))}, "at least 2 images"),
        ({"features": np.full((48, 2), 1e200)}, "must be finite"),
        ({"features": np.zeros((48, 2), np.longdouble)}, "must be float16, float32, float64"),
        ({"metadata": np.array(["{}"])}, "not valid JSON"),
        ({"metadata": np.array("[1]")}, "damaged or incomplete"),
        ({"metadata": np.array("[" * 100_000)}, "nested too deeply"),
    ],
)
def test_damaged_files_of_ours_are_refused(
    changes: dict[str, np.ndarray], message: str, features: FeatureSet, tmp_path: Path
) -> None:
    path = tmp_path / "set.npz"
    save_statistics(features, path)
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **(arrays | changes))
    with pytest.raises(StorageError, match=message) as caught:
        load_statistics(path)
    assert "set.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights_sha256", 6), ("extractor", None), ("assumed", "no"), ("precision", []), ("x", "y")],
)
def test_the_space_of_a_file_is_checked(
    name: str, value: object, features: FeatureSet, tmp_path: Path
) -> None:
    path = tmp_path / "set.npz"
    save_statistics(features, path)
    with np.load(path) as archive:
        arrays = dict(archive)
    metadata = json.loads(str(arrays["metadata"]))
    metadata["space"][name] = value
    np.savez(path, **(arrays | {"metadata": np.array(json.dumps(metadata))}))
    with pytest.raises(StorageError, match=r"set\.npz' is damaged or incomplete"):
        load_statistics(path)


def write_member(path: Path, header: str, data: bytes, *, pad: bool = True) -> None:
    """An .npz file with `mu` as given and a good `sigma`."""
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64 if pad else 0) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("mu.npy", start + text + data)
        sigma = io.BytesIO()
        np.save(sigma, np.eye(3))
        archive.writestr("sigma.npy", sigma.getvalue())


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ("(1_000_000_000_000,)", bytes(24), "does not have the size that its header says"),
        ("(3,)", bytes(23), "does not have the size"),
        ("(3,)", bytes(25), "does not have the size"),
        ("(-3,)", bytes(24), "does not have the size"),
        ("(-3, -1)", bytes(24), "does not have the size"),
        ("(10_000_000,)", bytes(80_000_000), "too strongly compressed"),
        ("(" * 3000 + ")" * 3000, bytes(24), "cannot be read"),
    ],
)
def test_sizes_are_checked_before_anything_is_allocated(
    shape: str, data: bytes, message: str, tmp_path: Path
) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    write_member(tmp_path / "set.npz", header, data)
    with pytest.raises(StorageError, match=message):
        load_statistics(tmp_path / "set.npz", assume_protocol="atc")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.npz")
    with pytest.raises(StorageError, match="must be a regular file"):
        load_statistics(tmp_path / "set.npz")


def read_or_refuse(path: Path) -> None:
    """What is read can be compared; what cannot be read is a ValueError."""
    try:
        loaded = load_statistics(path, assume_protocol="atc")
    except ValueError as error:
        assert "set.npz" in str(error)  # noqa: PT017
        return
    if isinstance(loaded, FeatureSet):
        fitted = Gaussian.from_features(loaded.features)
        assert len(loaded.files) == len(loaded.hashes)
        assert json.dumps(asdict(loaded.space))
    else:
        fitted = loaded.gaussian
    assert isfinite(frechet_distance(fitted, fitted))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        if data.draw(st.booleans(), "from a good file"):
            save_statistics(GOOD, path)
            content = bytearray(path.read_bytes())
            places = st.integers(0, len(content) - 1)
            for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)))):
                content[place] = byte
            cut = data.draw(st.none() | places)
            path.write_bytes(content[:cut])
        else:
            path.write_bytes(data.draw(st.binary()))
        read_or_refuse(path)


ANY_ARRAY = st.one_of(
    hypothesis_numpy.arrays(
        hypothesis_numpy.scalar_dtypes()
        | hypothesis_numpy.floating_dtypes(sizes=(16, 32, 64))
        | hypothesis_numpy.unicode_string_dtypes(),
        hypothesis_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    st.text(max_size=20).map(np.array),
)


@settings(max_examples=300, deadline=None)
@given(
    arrays=st.dictionaries(
        st.sampled_from(["features", "feats", "mu", "sigma", "files", "hashes"]), ANY_ARRAY
    ),
    from_ours=st.booleans(),
)
def test_any_arrays_are_read_or_refused(arrays: dict[str, np.ndarray], from_ours: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        if from_ours:
            save_statistics(GOOD, path)
            with np.load(path) as archive:
                arrays = dict(archive) | arrays
        np.savez(path, **arrays)
        read_or_refuse(path)


@settings(max_examples=200, deadline=None)
@given(
    mean=hypothesis_numpy.arrays(float, 3, elements=st.floats()),
    covariance=hypothesis_numpy.arrays(float, (3, 3), elements=st.floats()),
    symmetric=st.booleans(),
)
def test_any_numbers_are_read_or_refused(
    mean: np.ndarray, covariance: np.ndarray, symmetric: bool
) -> None:
    with np.errstate(all="ignore"), TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        np.savez(path, mu=mean, sigma=covariance @ covariance.T if symmetric else covariance)
        read_or_refuse(path)


def test_saving_is_checked(features: FeatureSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_statistics(features, tmp_path / "set.npy")
    one = FeatureSet(features.features[:1], ("a",), ("b",), features.space)
    with pytest.raises(ValueError, match="at least 2 images"):
        save_statistics(one, tmp_path / "one.npz")
    assert list(tmp_path.glob("*.np?")) == []
