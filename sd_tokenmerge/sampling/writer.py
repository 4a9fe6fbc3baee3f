"""Encode and store images behind the pipeline's back, so that it need not wait for them."""

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
    """Stores images and then records them in a manifest, in threads of its own.

    An image is recorded only when it is on the disk as a whole. Errors surface at the next `submit`
    or at `close`; after one, nothing more is written.
    """

    def __init__(self, folder: Path, manifest: Path, text: Mapping[str, str]):
        """Open a writer.

        Args:
            folder: where the images go.
            manifest: what to append records to; nobody else may write it.
            text: PNG text for every image, besides its prompt and seed.
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
        """Store one image, `[height, width, 3]` in [0, 1]; waits only while too many are waiting.

        Raises:
            OSError: an earlier image could not be written.
        """
        while len(self._waiting) >= _WAITING_IMAGES or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._store, job, pixels, seconds, flagged))

    def close(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: an image could not be written.
        """
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._failed.set()  # after an error, what still waits is dropped
            self._pool.shutdown()

    def _store(
        self, job: ImageJob, pixels: NDArray[np.float32], seconds: float, flagged: bool
    ) -> None:
        if self._failed.is_set():
            return
        try:
            data = encode_png(pixels, {"prompt": job.prompt, "seed": str(job.seed), **self._text})
            write_atomically(self._folder / job.file, data)
            record = ImageRecord(
                file=job.file,
                class_index=job.class_index,
                image_index=job.image_index,
                seed=job.seed,
                prompt=job.prompt,
                sha256=hashlib.sha256(data).hexdigest(),
                seconds=round(seconds, 4),
                flagged=flagged,
            )
            with self._manifest_lock:
                append_line(self._manifest, record.to_line())
        except OSError:
            self._failed.set()
            raise


def encode_png(pixels: NDArray[np.float32], text: Mapping[str, str]) -> bytes:
    """An image as a PNG file, `[height, width, 3]` in [0, 1], rounded as diffusers rounds.

    Lossless, and compressed by runs of equal bytes only: in a quarter of the time of Pillow's
    default, which would be taken from the pipeline's threads. See docs/experiment.md for the sizes.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    buffer = io.BytesIO()
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.save(buffer, "png", pnginfo=info, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
