"""From image files to features: threads read and resize images while the network computes.

Threads suffice because Pillow releases the interpreter lock while it decodes and resizes. Every
forward pass has the same batch size (the last batch is padded): the choice of convolution
algorithm, and with it the last digits, depends on it, and features must not depend on how images
are shared among processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sd_tokenmerge.fid.extractors import Extractor
from sd_tokenmerge.fid.images import ImageError, read_image
from sd_tokenmerge.machine import usable_cores
from sd_tokenmerge.processes import Processes

Resize = Callable[[Image.Image, int], Tensor]


def extract(
    paths: Sequence[Path],
    extractor: Extractor,
    resize: Resize,
    *,
    autocast: torch.dtype | None,
    batch_size: int,
    num_workers: int | None,
    processes: Processes,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Features of the given files, `[N, D]` float32 on the CPU.

    Raises:
        ValueError: a file cannot be read (`ImageError`) or the network gave NaN or infinity for
            one, in this process or another of the group.
    """
    total = len(paths)

    def advance(done: int) -> None:
        if progress is not None:
            progress(min(done * processes.count, total), total)

    shard: Tensor | ValueError
    try:
        shard = _extract_shard(
            paths[processes.rank :: processes.count],
            extractor,
            resize,
            autocast=autocast,
            batch_size=min(batch_size, total),
            num_workers=num_workers,
            device=processes.device,
            progress=advance,
        )
    except ValueError as error:
        shard = error
    features = torch.empty(total, extractor.num_features)
    for rank, rows in enumerate(processes.gather(shard)):
        if isinstance(rows, ValueError):
            raise rows
        features[rank :: processes.count] = rows
    return features


def _extract_shard(
    paths: Sequence[Path],
    extractor: Extractor,
    resize: Resize,
    *,
    autocast: torch.dtype | None,
    batch_size: int,
    num_workers: int | None,
    device: torch.device,
    progress: Callable[[int], None],
) -> Tensor:
    network = extractor.load().to(device)
    features = torch.empty(len(paths), extractor.num_features)
    done = 0
    progress(0)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.type == "cuda":  # TF32 would leave three digits
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, autocast))
        for pixels in _load_batches(paths, resize, extractor.image_size, batch_size, num_workers):
            count = pixels.shape[0]
            if count < batch_size:
                filler = pixels[-1:].expand(batch_size - count, -1, -1, -1)
                pixels = torch.cat([pixels, filler])
            output = network(extractor.normalize(pixels.to(device)))
            features[done : done + count] = output[:count].float().cpu()
            done += count
            progress(done)
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        bad = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
        raise ImageError(
            f"The network {extractor.name} gave NaN or infinity for {len(bad)} of {len(paths)} "
            f"images, the first being {str(bad[0])!r}."
        )
    return features


def _load_batches(
    paths: Sequence[Path], resize: Resize, size: int, batch_size: int, num_workers: int | None
) -> Iterator[Tensor]:
    workers = num_workers or min(usable_cores(), 16)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tensor]] = deque()
        upcoming = iter(paths)
        ahead = 2 * batch_size

        def top_up() -> None:
            while len(waiting) < ahead and (path := next(upcoming, None)) is not None:
                waiting.append(pool.submit(_load, path, resize, size))

        try:
            top_up()
            while waiting:
                count = min(batch_size, len(waiting))
                batch = [waiting.popleft().result() for _ in range(count)]
                top_up()
                yield torch.stack(batch)
        finally:
            for future in waiting:
                future.cancel()


def _load(path: Path, resize: Resize, size: int) -> Tensor:
    return resize(read_image(path), size)
