"""Stage 2: latents of rendered pictures, written once so that the denoiser trains on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from sample_world import CLASSES, render
from torch import Tensor

BATCH = 16


@torch.no_grad()
def latent_set(
    autoencoder: AutoencoderTiny, folder: Path, count: int, size: int, first_seed: int
) -> tuple[Tensor, Tensor]:
    """Latents and class indices of `count` pictures of `size` pixels, from a file if it exists.

    Picture `i` shows class `CLASSES[i % 12]`, drawn with seed `first_seed + i`.

    Returns:
        `[count, 8, size / 8, size / 8]` float16 and `[count]` int64.
    """
    path = folder / f"latents_{size}_{count}.safetensors"
    if not path.exists():
        started = time.perf_counter()
        chunks = []
        for start in range(0, count, BATCH):
            pictures = [
                np.asarray(render(CLASSES[i % len(CLASSES)], first_seed + i, size))
                for i in range(start, min(start + BATCH, count))
            ]
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast(autoencoder.device.type, dtype=torch.bfloat16):
                encoded = autoencoder.encode(batch.to(autoencoder.device)).latents
            chunks.append(encoded.half().cpu())
            if start % (BATCH * 20) == 0:
                elapsed = time.perf_counter() - started
                left = elapsed / (start + BATCH) * (count - start - BATCH) / 60
                print(
                    f"latents {size} px: {start + BATCH}/{count}, {left:.1f} min left", flush=True
                )
        classes = torch.tensor([CLASSES[i % len(CLASSES)] for i in range(count)])
        partial = path.with_suffix(".partial")
        save_file({"latents": torch.cat(chunks).contiguous(), "classes": classes}, partial)
        os.replace(partial, path)
    stored = load_file(path)
    return stored["latents"], stored["classes"]
