"""Measure the sample pipeline: class accuracy, set distances, use of self-attention, contact sheet.

    python scripts/measure_sample_pipeline.py --pipeline samples/pipeline --out samples/measured

A small classifier is trained on rendered pictures and names generated ones; EfficientNet-Lite0's
features give set distances to rendered pictures; heavy random merging shows how much the model's
self-attention matters. Writes `measured.json` and `contact_sheet.png`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sample_classifier import FIRST_SEED, STEPS, named_correctly, train_classifier
from sample_pictures import PIPELINE, SamplePipeline
from sample_world import CLASSES, REFERENCE_SEED, Picture, rendered, save
from torch import nn

from sd_tokenmerge import apply_patch
from sd_tokenmerge.fid.evaluate import compare


def main() -> None:
    """Generate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images-per-class", type=int, default=8)
    parser.add_argument("--references-per-class", type=int, default=40)
    parser.add_argument("--classifier-steps", type=int, default=STEPS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    per_class = options.images_per_class
    classifier = train_classifier(options.classifier_steps)
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference"
        save(rendered(options.references_per_class), reference)

        def measure(name: str, pictures: list[Picture]) -> dict[str, float]:
            save(pictures, Path(scratch) / name)
            found = compare(
                reference, Path(scratch) / name, extractor="efficientnet-lite0", force=True
            )
            return {"accuracy": accuracy(classifier, pictures), "distance": found.fid}

        def generate(sample: SamplePipeline) -> list[Picture]:
            return sample.generate(per_class, per_class, CLASSES)

        sample = SamplePipeline(options.pipeline)
        pictures = generate(sample)
        generated = measure("generated", pictures)
        real = measure("real", rendered(per_class, REFERENCE_SEED + 10**6))
        with apply_patch(sample.pipe, "random", keep_rate=0.1):
            merged = generate(sample)
        measured = {
            "classifier_accuracy_rendered": accuracy(classifier, rendered(20, FIRST_SEED // 2)),
            "images_per_class": per_class,
            "references_per_class": options.references_per_class,
            "accuracy_generated": generated["accuracy"],
            "accuracy_by_class": {
                index: accuracy(classifier, [p for p in pictures if p[0] == index])
                for index in CLASSES
            },
            "distance": generated["distance"],
            "distance_of_rendered": real["distance"],
            "random_merging_keep_10": {
                **measure("merged", merged),
                "median_psnr_db_to_unmerged": median_psnr(pictures, merged),
            },
        }
    (options.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    contact_sheet(pictures, min(4, per_class)).save(options.out / "contact_sheet.png")
    print(json.dumps(measured, indent=2))


def accuracy(net: nn.Module, pictures: list[Picture]) -> float:
    """Share of the pictures that the classifier names correctly."""
    return float(np.mean(named_correctly(net, pictures)))


def median_psnr(first: list[Picture], second: list[Picture]) -> float:
    """Median over the pictures of the PSNR between equal seeds, in dB."""
    values = []
    for (_, _, a), (_, _, b) in zip(first, second, strict=True):
        error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
        values.append(10 * np.log10(255**2 / max(error, 1e-12)))
    return float(np.median(values))


def contact_sheet(pictures: list[Picture], rows: int, side: int = 128) -> Image.Image:
    """One column per class."""
    sheet = Image.new("RGB", (len(CLASSES) * side, rows * side))
    for c, i, image in pictures:
        if i < rows:
            small = image.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (CLASSES.index(c) * side, i * side))
    return sheet


if __name__ == "__main__":
    main()
