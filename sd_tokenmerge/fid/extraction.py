"""From image files to features: threads read and resize images while the network computes.

Threads suffice because Pillow releases the interpreter lock while it decodes and resizes. Every
forward pass has the same batch size (the last batch is padded), because the batch size selects the
convolution algorithm and so changes the last digits, and features must not depend on how images are
shared among processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Features of the given files, `[N, D]` float32 on the CPU; each process extracts its share.

    Args:
        paths: N image files.
        extractor: the network.
        resize: as in `Protocol`.
        autocast: dtype of automatic mixed precision; None for float32 throughout.
        batch_size: images per forward pass.
        num_workers: threads that read and resize; None for one per usable processor, at most 16.
        processes: the group; all of its processes must call this.
        progress: called with (images done, N), first with 0.

    Raises:
        ValueError: a file cannot be read (`ImageError`) or the network gave NaN or infinity for
            one, in this process or another of the group.
    """
    total = len(paths)
    own = paths[processes.rank :: processes.count]
    batch_size = min(batch_size, total)

    def advance(done: int) -> None:
        if progress is not None:
            progress(min(done * processes.count, total), total)

    shard: Tensor | ValueError
    try:
        network = extractor.load().to(processes.device)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if processes.device.type == "cuda":  # TF32 would leave three digits
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            if autocast is not None:
                stack.enter_context(torch.autocast(processes.device.type, autocast))
            batches = _load_batches(own, resize, extractor.image_size, batch_size, num_workers)
            shard = _forward(network, extractor, batches, batch_size, processes.device, advance)
        _require_finite(shard, own, extractor.name)
    except ValueError as error:
        shard = error
    features = torch.empty(total, extractor.num_features)
    for rank, rows in enumerate(processes.gather(shard)):
        if isinstance(rows, ValueError):
            raise rows
        features[rank :: processes.count] = rows
    return features


def _forward(
    network: torch.nn.Module,
    extractor: Extractor,
    batches: Iterable[Tensor],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> Tensor:
    rows = [torch.empty(0, extractor.num_features)]
    done = 0
    advance(done)
    for pixels in batches:
        count = pixels.shape[0]
        if count < batch_size:
            filler = pixels[-1:].expand(batch_size - count, -1, -1, -1)
            pixels = torch.cat([pixels, filler])
        output = network(extractor.normalize(pixels.to(device)))
        rows.append(output[:count].float().cpu())
        done += count
        advance(done)
    return torch.cat(rows)


def _require_finite(features: Tensor, paths: Sequence[Path], name: str) -> None:
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ImageError(
            f"The network {name} gave NaN or infinity for {len(bad)} of {len(paths)} images, the "
            f"first being {str(paths[bad[0]])!r}."
        )


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
