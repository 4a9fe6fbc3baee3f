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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sample_pictures import PIPELINE, SamplePipeline
from sample_world import CLASSES, REFERENCE_SEED, Picture, render, rendered, save
from torch import Tensor, nn

from sd_tokenmerge import apply_patch
from sd_tokenmerge.fid.evaluate import compare

CLASSIFIER_SEED = 3_000_000_000
SIDE = 64


def main() -> None:
    """Generate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument(
        "--undertrained",
        type=Path,
        nargs="*",
        default=[],
        help="pipelines from earlier in training, for comparison",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images-per-class", type=int, default=8)
    parser.add_argument("--references-per-class", type=int, default=40)
    parser.add_argument("--classifier-steps", type=int, default=600)
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
        early = {
            folder.name: measure(folder.name, generate(SamplePipeline(folder)))
            for folder in options.undertrained
        }
        with apply_patch(sample.pipe, "random", keep_rate=0.1):
            merged = generate(sample)
        measured = {
            "classifier_accuracy_rendered": accuracy(
                classifier, rendered(20, CLASSIFIER_SEED // 2)
            ),
            "images_per_class": per_class,
            "references_per_class": options.references_per_class,
            "accuracy_generated": generated["accuracy"],
            "accuracy_by_class": {
                index: accuracy(classifier, [p for p in pictures if p[0] == index])
                for index in CLASSES
            },
            "distance": generated["distance"],
            "distance_of_rendered": real["distance"],
            **early,
            "random_merging_keep_10": {
                **measure("merged", merged),
                "median_psnr_db_to_unmerged": median_psnr(pictures, merged),
            },
        }
    (options.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    contact_sheet(pictures, min(4, per_class)).save(options.out / "contact_sheet.png")
    print(json.dumps(measured, indent=2))


def to_input(images: Iterable[Image.Image]) -> Tensor:
    """`[B, 3, 64, 64]` float32 in [-1, 1]."""
    arrays = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(steps: int) -> nn.Module:
    """A small convolutional network, trained on rendered pictures with some blur."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 48), (48, 96), (96, 96)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, len(CLASSES)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    batch = 2 * len(CLASSES)
    for step in range(steps):
        images = []
        for k in range(batch):
            image = render(CLASSES[k % len(CLASSES)], CLASSIFIER_SEED + step * batch + k, 128)
            images.append(image.filter(ImageFilter.GaussianBlur((k % 3) * 0.7)))
        target = torch.arange(batch) % len(CLASSES)
        loss = nn.functional.cross_entropy(net(to_input(images)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, pictures: list[Picture]) -> float:
    """Share of the pictures classified correctly."""
    named = net(to_input(image for _, _, image in pictures)).argmax(1)
    return float((named == torch.tensor([CLASSES.index(c) for c, _, _ in pictures])).float().mean())


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
