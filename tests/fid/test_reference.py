from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from sd_tokenmerge.fid.imagenet_val import ReferenceSetError, find_validation_images, read_labels
from sd_tokenmerge.fid.reference import MANIFEST, choose, make_reference, verify_reference
from sd_tokenmerge.sampling.imagenet import CLASSES, val_first_five

KNOWN = val_first_five()
EXTRA = range(40_000, 40_200)  # further images, labelled below


def synthetic_labels() -> list[int]:
    """Class index of images 1 to 50,000: right for the known ones, arbitrary for the others."""
    labels = [number * 7 % 1000 for number in range(1, 50_001)]
    for class_index, numbers in enumerate(KNOWN):
        for number in numbers:
            labels[number - 1] = class_index
    return labels


LABELS = synthetic_labels()
SYNSETS = [CLASSES[label].synset for label in LABELS]


def name(number: int, ending: str = "") -> str:
    return f"ILSVRC2012_val_{number:08d}{ending}.JPEG"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known images and some others, in one folder; their content is their number."""
    folder = tmp_path_factory.mktemp("imagenet") / "val"
    folder.mkdir()
    for number in [*(n for numbers in KNOWN for n in numbers), *EXTRA]:
        (folder / name(number)).write_bytes(b"%d" % number)
    return folder


@pytest.fixture
def val(flat: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `flat` of one's own, by hard links."""
    shutil.copytree(flat, tmp_path / "data" / "val", copy_function=os.link)
    yield tmp_path / "data" / "val"
    shutil.rmtree(tmp_path / "data")


def devkit_meta(path: Path) -> dict[int, int]:
    """Write a meta.mat like the devkit's, inner nodes included; class index by id."""
    ids = [(index * 389 + 11) % 1000 + 1 for index in range(1000)]  # not the order of the synsets
    rows = [(number, CLASSES[index].synset) for index, number in enumerate(ids)]
    rows += [(1001 + extra, f"n9{extra:07d}") for extra in range(5)]
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(n, s, "words") for n, s in sorted(rows)], dtype=dtype)
    scipy.io.savemat(path, {"synsets": synsets.reshape(-1, 1)})
    return dict(enumerate(ids))


def arrange(layout: str, val: Path) -> None:
    if layout == "synset-folders":
        for path in sorted(val.iterdir()):
            synset = SYNSETS[int(path.stem[-8:]) - 1]
            (val / synset).mkdir(exist_ok=True)
            path.rename(val / synset / path.name)
    elif layout == "hf-names":
        for path in sorted(val.iterdir()):
            path.rename(val / f"{path.stem}_{SYNSETS[int(path.stem[-8:]) - 1]}.JPEG")
    elif layout == "kaggle-csv":
        rows = [f"ILSVRC2012_val_{n:08d},{s} 1 2 3 4 {s} 5 6 7 8" for n, s in enumerate(SYNSETS, 1)]
        rows = rows[::-1]  # Kaggle's rows are in no order
        (val.parent / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\n" + "\n".join(rows)
        )
    elif layout == "devkit":
        numbers = devkit_meta(val.parent / "meta.mat")
        lines = [str(numbers[label]) for label in LABELS]
        (val.parent / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")
    elif layout == "synset-list":
        path = val / "imagenet_2012_validation_synset_labels.txt"
        path.write_text("\n".join(SYNSETS) + "\n")
    elif layout == "index-list":
        rows = [f"{name(number)} {label}" for number, label in enumerate(LABELS, 1)]
        (val.parent / "val.txt").write_text("\n".join(rows) + "\n")


LAYOUTS = (
    "synset-folders",
    "hf-names",
    "kaggle-csv",
    "devkit",
    "synset-list",
    "index-list",
    "known-list",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_set(layout: str, val: Path, tmp_path: Path) -> None:
    arrange(layout, val)
    out = tmp_path / "out"
    result = make_reference(val, out)
    assert result.layout == layout
    assert len(result.images) == 5000
    for number in (*KNOWN[0], *KNOWN[999]):
        assert (out / name(number)).read_bytes() == b"%d" % number
    assert len(list(out.iterdir())) == 5001
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert lines[0] == {
        "file": "ILSVRC2012_val_00000293.JPEG",
        "class_index": 0,
        "synset": "n01440764",
        "sha256": hashlib.sha256(b"293").hexdigest(),
    }
    assert [line["class_index"] for line in lines] == [i // 5 for i in range(5000)]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_links_point_to_the_source(val: Path, tmp_path: Path) -> None:
    make_reference(val, tmp_path / "out", link=True)
    link = tmp_path / "out" / name(293)
    assert link.is_symlink()
    assert link.resolve() == val / name(293)


def test_a_set_that_is_there_is_verified(val: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_reference(val, out)
    assert make_reference(tmp_path / "gone", out).reused
    (out / name(293)).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"val_00000293\.JPEG' is not what the manifest says"):
        make_reference(val, out)
    (out / name(293)).unlink()
    with pytest.raises(ValueError, match=r"1 files are missing.*val_00000293"):
        verify_reference(out)
    (out / MANIFEST).write_text("{}\n")
    with pytest.raises(ValueError, match="is not a manifest"):
        verify_reference(out)
    (out / MANIFEST).write_text("")
    with pytest.raises(ValueError, match="does not list the 5,000"):
        verify_reference(out)


def test_a_folder_that_is_something_else_is_left_alone(val: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new folder or a reference set.*no manifest"):
        make_reference(val, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_missing_image_is_named(val: Path, tmp_path: Path) -> None:
    (val / name(2138)).unlink()
    (val / name(7197)).unlink()
    with pytest.raises(ReferenceSetError, match=r"2 of the 5,000 .* first being .*00002138\.JPEG"):
        make_reference(val, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_labels_are_noticed(val: Path, tmp_path: Path) -> None:
    shifted = SYNSETS[1:] + SYNSETS[:1]
    (val / "synset_labels.txt").write_text("\n".join(shifted))
    with pytest.raises(ReferenceSetError, match=r"\(synset-list\) give other images.*n01440764"):
        make_reference(val, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_in_the_wrong_folder_is_noticed(val: Path, tmp_path: Path) -> None:
    arrange("synset-folders", val)
    (val / "n01440764" / name(293)).rename(val / "n01443537" / name(293))
    with pytest.raises(ReferenceSetError, match="give other images than the known ones for 2 of"):
        make_reference(val, tmp_path / "out")


def test_ground_truth_without_meta_is_refused(val: Path, tmp_path: Path) -> None:
    arrange("devkit", val)
    (val.parent / "meta.mat").unlink()
    with pytest.raises(ReferenceSetError, match=r"only the devkit's meta\.mat translates"):
        make_reference(val, tmp_path / "out")


def test_a_devkit_folder_works_as_it_is_unpacked(val: Path, tmp_path: Path) -> None:
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    numbers = devkit_meta(data / "meta.mat")
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("\n".join(str(numbers[label]) for label in LABELS))
    found = find_validation_images(val, truth)
    assert found.layout == "devkit"
    assert choose(found) == KNOWN


def test_a_failed_copy_leaves_nothing(
    val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        make_reference(val, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_sources_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ReferenceSetError, match="must be an existing folder"):
        make_reference(tmp_path / "gone", out)
    (tmp_path / "root" / "val").mkdir(parents=True)
    with pytest.raises(ReferenceSetError, match=r"found neither\. Give its folder `val`"):
        make_reference(tmp_path / "root", out)
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "train" / "n01440764" / "n01440764_10026.JPEG").write_bytes(b"")
    with pytest.raises(ReferenceSetError, match="is this the training set"):
        make_reference(tmp_path / "train", out)
    (tmp_path / "other" / "n00000001").mkdir(parents=True)
    with pytest.raises(ReferenceSetError, match="'n00000001' is not one of"):
        make_reference(tmp_path / "other", out)
    assert not out.exists()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    (folder / name(1, "_n01751748")).write_bytes(b"")
    (folder / name(2)).write_bytes(b"")
    with pytest.raises(ReferenceSetError, match=r"1 of 2 file names .* end in a synset"):
        find_validation_images(folder)
    (folder / name(1)).write_bytes(b"")
    with pytest.raises(ReferenceSetError, match="Image 1 is there twice"):
        find_validation_images(folder)
    for synset in ("n01440764", "n01443537"):
        (folder / synset).mkdir()
        (folder / synset / name(5)).write_bytes(b"")
    with pytest.raises(ReferenceSetError, match="Image 5 is in two folders"):
        find_validation_images(folder)
    with pytest.raises(ReferenceSetError, match="`labels` is for a flat folder"):
        find_validation_images(folder, tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no known label file"),
        ("tench\ngoldfish\n", "is no known label file; it begins with 'tench'"),
        ("n01440764\n" * 10, "must label each of the 50,000 validation images once, got 10"),
        ("n00000001\n" * 50_000, "'n00000001', which is not a synset"),
        (f"{name(1)} 65\n{name(2)} 1000\n", "must have a file name and a class index"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001,\n", "a row without image or synset"),
        ("ImageId,Other\nILSVRC2012_val_00000001,x\n", "a row without image or synset"),
    ],
)
def test_label_files_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(content)
    with pytest.raises(ReferenceSetError, match=message):
        read_labels(tmp_path / "labels.txt")


def test_damaged_meta_is_refused(tmp_path: Path) -> None:
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n")
    (tmp_path / "meta.mat").write_bytes(b"nothing")
    with pytest.raises(ReferenceSetError, match=r"is not the devkit's meta\.mat"):
        read_labels(truth)
    devkit_meta(tmp_path / "meta.mat")
    truth.write_text("1001\n")
    with pytest.raises(ReferenceSetError, match=r"a number in \[1, 1000\] a line, got '1001'"):
        read_labels(truth)
    with pytest.raises(ReferenceSetError, match="must be an existing file"):
        read_labels(tmp_path / "gone.txt")
