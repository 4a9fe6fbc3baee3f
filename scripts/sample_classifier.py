"""A small classifier of the sample world's pictures, trained on rendered ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sample_world import CLASSES, Picture, render
from torch import Tensor, nn

FIRST_SEED = 3_000_000_000
"""First seed of its training pictures, far from all others."""
SIDE = 64
STEPS = 600


def load_classifier(path: Path, steps: int = STEPS) -> nn.Module:
    """The classifier whose weights are in a file; trained and stored if there is no such file."""
    if not path.exists():
        net = train_classifier(steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(net.state_dict(), partial)
        partial.rename(path)
    net = _network()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def train_classifier(steps: int) -> nn.Module:
    """A small convolutional network, trained on rendered pictures with some blur."""
    torch.manual_seed(0)
    net = _network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    batch = 2 * len(CLASSES)
    for step in range(steps):
        images = []
        for k in range(batch):
            image = render(CLASSES[k % len(CLASSES)], FIRST_SEED + step * batch + k, 128)
            images.append(image.filter(ImageFilter.GaussianBlur((k % 3) * 0.7)))
        target = torch.arange(batch) % len(CLASSES)
        loss = nn.functional.cross_entropy(net(_to_input(images)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def named_correctly(net: nn.Module, pictures: Sequence[Picture]) -> list[bool]:
    """Whether the classifier names the class of each picture."""
    named = net(_to_input(image for _, _, image in pictures)).argmax(1).tolist()
    return [CLASSES[found] == c for found, (c, _, _) in zip(named, pictures, strict=True)]


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 48), (48, 96), (96, 96)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, len(CLASSES)))


def _to_input(images: Iterable[Image.Image]) -> Tensor:
    """`[B, 3, 64, 64]` float32 in [-1, 1]."""
    arrays = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
