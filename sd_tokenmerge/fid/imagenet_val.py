"""Which class each ImageNet validation image is of, from every layout the data set comes in.

| layout | how classes are told |
|---|---|
| `synset-folders` | `val/n01440764/ILSVRC2012_val_00000293.JPEG` (torchvision, ATC) |
| `hf-names` | flat, `ILSVRC2012_val_00000293_n01440764.JPEG` (Hugging Face) |
| `kaggle-csv` | flat, `LOC_val_solution.csv` (image id, then synset and boxes) |
| `devkit` | flat, `ILSVRC2012_validation_ground_truth.txt` with `meta.mat` |
| `synset-list` | flat, one synset a line (caffe's `imagenet_2012_validation_synset_labels.txt`) |
| `index-list` | flat, file name and class index a line (caffe's `val.txt`) |
| `known-list` | flat, no labels: the list of the 5,000 images that comes with this package |

The devkit's numbers are not class indices (65 is written as 490); without `meta.mat`, which
translates them, they are refused.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_tokenmerge.sampling.imagenet import CLASSES

NUM_VALIDATION_IMAGES = 50_000
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?\.(?:JPEG|jpeg|JPG|jpg)")
_SYNSET = re.compile(r"n\d{8}")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LABEL_FILES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "synset_labels.txt",
    "val.txt",
    _GROUND_TRUTH,
)
CLASS_OF_SYNSET = {entry.synset: entry.index for entry in CLASSES}


class ReferenceSetError(ValueError):
    """The source is not the validation set, or not all of it; the message says what is wrong."""


@dataclass(frozen=True)
class ValidationImages:
    """Validation images that were found.

    Attributes:
        layout: which of the layouts above.
        paths: by image number, 1 to 50,000.
        classes: class index by image number; None for `known-list`.
    """

    layout: str
    paths: dict[int, Path]
    classes: dict[int, int] | None


def find_validation_images(source: Path, labels: Path | None = None) -> ValidationImages:
    """Find the images and their classes.

    Args:
        source: folder of synset folders, or of images.
        labels: label file for a flat folder (for the devkit: the ground truth, with `meta.mat`
            beside it or in the same devkit); None looks in `source` and beside it.

    Raises:
        ReferenceSetError: `source` has none of the layouts, or its labels contradict it.
    """
    if not source.is_dir():
        raise ReferenceSetError(f"`source` must be an existing folder, got {str(source)!r}.")
    entries = sorted(source.iterdir())
    folders = [entry for entry in entries if entry.is_dir() and _SYNSET.fullmatch(entry.name)]
    if folders:
        if labels is not None:
            raise ReferenceSetError("`labels` is for a flat folder, but there are synset folders.")
        return _from_synset_folders(folders)
    paths = _numbered(entries)
    if not paths:
        hint = " Give its folder `val`." if (source / "val").is_dir() else ""
        raise ReferenceSetError(
            f"{str(source)!r} must hold synset folders (n01440764, ...) or images called "
            f"ILSVRC2012_val_00000001.JPEG, found neither.{hint}"
        )
    synsets = {number: _NAME.fullmatch(path.name) for number, path in paths.items()}
    told = {n: match.group(2) for n, match in synsets.items() if match and match.group(2)}
    if told:
        if len(told) != len(paths):
            raise ReferenceSetError(
                f"{len(told)} of {len(paths)} file names in {str(source)!r} end in a synset; "
                "either all or none must."
            )
        return ValidationImages("hf-names", paths, _indices(told, str(source)))
    labels = labels or _find_labels(source)
    if labels is None:
        return ValidationImages("known-list", paths, None)
    layout, classes = read_labels(labels)
    return ValidationImages(layout, paths, classes)


def read_labels(path: Path) -> tuple[str, dict[int, int]]:
    """Read a label file; its kind is told by its content.

    Returns:
        The layout's name, and class index by image number for all 50,000 images.

    Raises:
        ReferenceSetError: the file does not exist, is of no known kind, or is not complete.
    """
    if not path.is_file():
        raise ReferenceSetError(f"`labels` must be an existing file, got {str(path)!r}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ReferenceSetError(f"{str(path)!r} must be a text file.") from error
    lines = [line.strip() for line in lines if line.strip()]
    first = lines[0] if lines else ""
    if first.startswith("ImageId,"):
        layout, classes = "kaggle-csv", _from_kaggle(path, lines)
    elif _SYNSET.fullmatch(first):
        layout = "synset-list"
        classes = _indices(dict(enumerate(lines, start=1)), str(path))
    elif first.isdecimal():
        layout, classes = "devkit", _from_devkit(path, lines)
    elif _NAME.fullmatch(first.split()[0].rpartition("/")[2] if first else ""):
        layout, classes = "index-list", _from_index_list(path, lines)
    else:
        raise ReferenceSetError(
            f"{str(path)!r} is no known label file; it begins with {first[:40]!r}."
        )
    if set(classes) != set(range(1, NUM_VALIDATION_IMAGES + 1)):
        raise ReferenceSetError(
            f"{str(path)!r} must label each of the {NUM_VALIDATION_IMAGES:,} validation images "
            f"once, got {len(classes):,} labels."
        )
    return layout, classes


def _from_synset_folders(folders: Sequence[Path]) -> ValidationImages:
    paths: dict[int, Path] = {}
    classes: dict[int, int] = {}
    for folder in folders:
        if folder.name not in CLASS_OF_SYNSET:
            raise ReferenceSetError(f"{folder.name!r} is not one of ImageNet-1k's 1,000 synsets.")
        for number, path in _numbered(sorted(folder.iterdir())).items():
            if number in paths:
                raise ReferenceSetError(
                    f"Image {number} is in two folders: {str(paths[number])!r} and {str(path)!r}."
                )
            paths[number], classes[number] = path, CLASS_OF_SYNSET[folder.name]
    if not paths:
        raise ReferenceSetError(
            f"The synset folders in {str(folders[0].parent)!r} must hold validation images "
            "(ILSVRC2012_val_00000001.JPEG), found none: is this the training set?"
        )
    return ValidationImages("synset-folders", paths, classes)


def _numbered(entries: Sequence[Path]) -> dict[int, Path]:
    paths: dict[int, Path] = {}
    for entry in entries:
        if (match := _NAME.fullmatch(entry.name)) and entry.is_file():
            number = int(match.group(1))
            if number in paths:
                raise ReferenceSetError(
                    f"Image {number} is there twice: {paths[number].name!r} and {entry.name!r}."
                )
            paths[number] = entry
    return paths


def _find_labels(source: Path) -> Path | None:
    for folder in (source, source.parent):
        for name in LABEL_FILES:
            if (path := folder / name).is_file():
                return path
    return None


def _indices(synsets: dict[int, str], origin: str) -> dict[int, int]:
    unknown = sorted(set(synsets.values()) - set(CLASS_OF_SYNSET))
    if unknown:
        raise ReferenceSetError(
            f"{origin!r} names {unknown[0]!r}, which is not a synset of ImageNet-1k."
        )
    return {number: CLASS_OF_SYNSET[synset] for number, synset in synsets.items()}


def _from_kaggle(path: Path, lines: Sequence[str]) -> dict[int, int]:
    synsets: dict[int, str] = {}
    for row in csv.DictReader(lines):
        match = _NAME.fullmatch(f"{row['ImageId']}.JPEG")
        prediction = (row.get("PredictionString") or "").split()
        if match is None or not prediction:
            raise ReferenceSetError(
                f"{str(path)!r} has a row without image or synset: {dict(row)}."
            )
        synsets[int(match.group(1))] = prediction[0]
    return _indices(synsets, str(path))


def _from_index_list(path: Path, lines: Sequence[str]) -> dict[int, int]:
    classes: dict[int, int] = {}
    for line in lines:
        name, _, index = line.rpartition(" ")
        match = _NAME.fullmatch(name.strip().rpartition("/")[2])
        if match is None or not index.isdecimal() or int(index) >= len(CLASSES):
            raise ReferenceSetError(
                f"{str(path)!r} must have a file name and a class index in [0, 1000) a line, "
                f"got {line!r}."
            )
        classes[int(match.group(1))] = int(index)
    return classes


def _from_devkit(path: Path, lines: Sequence[str]) -> dict[int, int]:
    places = (path.parent, path.parent.parent / "data", path.parent / "data")
    meta = next((p / "meta.mat" for p in places if (p / "meta.mat").is_file()), None)
    if meta is None:
        raise ReferenceSetError(
            f"{str(path)!r} numbers classes in the devkit's own order, which only the devkit's "
            "meta.mat translates: put it beside the file, or use another label file."
        )
    class_of_id = _read_meta(meta)
    classes: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal() or int(line) not in class_of_id:
            raise ReferenceSetError(
                f"{str(path)!r} must have a number in [1, 1000] a line, "
                f"got {line!r} in line {number}."
            )
        classes[number] = class_of_id[int(line)]
    return classes


def _read_meta(path: Path) -> dict[int, int]:
    """Class index by ILSVRC2012_ID; leaves have the ids 1 to 1,000."""
    import scipy.io
    from scipy.io.matlab import MatReadError

    damage = (MatReadError, zlib.error, LookupError, ValueError, TypeError, OSError)
    try:
        synsets = scipy.io.loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"]
        pairs = {
            int(number): str(synset)
            for number, synset in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except (*damage, NotImplementedError) as error:
        raise ReferenceSetError(f"{str(path)!r} is not the devkit's meta.mat: {error}.") from error
    leaves = {number: synset for number, synset in pairs.items() if 1 <= number <= len(CLASSES)}
    classes = _indices(leaves, str(path))
    if sorted(classes.values()) != list(range(len(CLASSES))):
        raise ReferenceSetError(f"{str(path)!r} must give the ids 1 to 1,000 to the 1,000 classes.")
    return classes
