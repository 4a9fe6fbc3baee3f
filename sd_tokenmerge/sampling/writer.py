"""Encode and store images in background threads, so that the pipeline does not wait for them."""

from __future__ import annotations

import hashlib
import io
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from sd_tokenmerge.files import append_line, write_atomically
from sd_tokenmerge.sampling.manifest import ImageRecord
from sd_tokenmerge.sampling.plan import ImageJob

_THREADS = 2
_WAITING_IMAGES = 64


class ImageWriter:
    """Stores images and records them in a manifest, in background threads.

    An image is recorded only once it is completely on the disk. Errors surface at the next `submit`
    or at `close`; after an error, nothing more is written.
    """

    def __init__(self, folder: Path, manifest: Path, text: Mapping[str, str]):
        """Open a writer.

        Args:
            folder: where the images are stored.
            manifest: the file that records are appended to; nothing else may write it.
            text: PNG text of every image, besides its prompt and seed.
        """
        self._folder = folder
        self._manifest = manifest
        self._text = dict(text)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="image-writer")
        self._waiting: deque[Future[None]] = deque()
        self._manifest_lock = threading.Lock()
        self._failed = threading.Event()

    def submit(
        self, job: ImageJob, pixels: NDArray[np.float32], seconds: float, flagged: bool
    ) -> None:
        """Queue one image, `[height, width, 3]` float32 in [0, 1]; blocks while the queue is full.

        Raises:
            OSError: an earlier image could not be written.
        """
        while len(self._waiting) >= _WAITING_IMAGES or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._store, job, pixels, seconds, flagged))

    def close(self) -> None:
        """Wait until all queued images are on the disk.

        Raises:
            OSError: an image could not be written.
        """
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._failed.set()  # after an error, the rest of the queue is dropped
            self._pool.shutdown()

    def _store(
        self, job: ImageJob, pixels: NDArray[np.float32], seconds: float, flagged: bool
    ) -> None:
        if self._failed.is_set():
            return
        try:
            data = encode_png(pixels, {"prompt": job.prompt, "seed": str(job.seed), **self._text})
            path = self._folder / job.file
            write_atomically(path, data)
            record = ImageRecord(
                file=job.file,
                class_index=job.class_index,
                image_index=job.image_index,
                seed=job.seed,
                prompt=job.prompt,
                sha256=hashlib.sha256(data).hexdigest(),
                bytes=len(data),
                modified_ns=path.stat().st_mtime_ns,
                seconds=round(seconds, 4),
                flagged=flagged,
            )
            with self._manifest_lock:
                append_line(self._manifest, record.to_line())
        except OSError:
            self._failed.set()
            raise


def encode_png(pixels: NDArray[np.float32], text: Mapping[str, str]) -> bytes:
    """Encode `[height, width, 3]` float32 pixels in [0, 1] as a PNG file, rounded as in diffusers.

    Compressed by run lengths only (zlib's RLE strategy), in a third of the time of Pillow's
    default, because the time is taken from the pipeline's threads. docs/experiment.md shows sizes.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    buffer = io.BytesIO()
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.save(buffer, "png", pnginfo=info, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
