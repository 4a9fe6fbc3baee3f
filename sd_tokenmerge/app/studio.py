"""Unmerged and merged pictures of any prompt by one pipeline, which is loaded once. No gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.patching.recording import Recording
from sd_tokenmerge.patching.report import Report
from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.report.clusters import draw_clusters
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.merging import patched, require_whole_tokens
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob, plan_images
from sd_tokenmerge.sampling.recorded import recorded_picture, single_picture
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.sampler import Sampler

DIFFERENCE_GAIN = 4
"""Factor on the differences of pixels, most of which would be too dark to be seen."""

_CACHED_PICTURES = 32

OnStep = Callable[[int, int], None]
"""Gets the number of steps so far and in all; may raise to stop the generation."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An unmerged picture.

    Attributes:
        image: RGB.
        seconds: that its generation took.
    """

    image: Image.Image
    seconds: float


@dataclass(frozen=True, eq=False)
class MergedPicture(Picture):
    """A picture that was made with merged tokens.

    Attributes:
        recording: the clusters.
        product_share: see the function of this name.
    """

    recording: Recording
    product_share: float

    def draw_clusters(self, step: int, block: int) -> tuple[Image.Image, str]:
        """Draw the clusters of one block in one step over the picture.

        Args:
            step: number of the step, from 1.
            block: number of the block in `recording.blocks`, from 1.

        Returns:
            The drawing and its title in Markdown; the picture itself if nothing was merged.
        """
        name = self.recording.blocks[block - 1]
        recorded = self.recording.steps[step - 1]
        title = (
            f"`{name}`, step {step} of {len(self.recording.steps)}, t = {recorded.timestep:.4g}: "
        )
        partition = recorded.partitions.get(name)
        if partition is None:
            return self.image, f"{title}nothing was merged"
        labels = partition.labels[-1, 0]  # the half of the batch with the prompt
        sizes = np.bincount(labels.ravel())
        title += f"{len(sizes):,} clusters of {sizes.min():,} to {sizes.max():,} tokens"
        return draw_clusters(self.image, labels), title


class Studio:
    """A pipeline and the unmerged pictures that it has made. Threads take turns."""

    def __init__(self, options: GenerateOptions) -> None:
        """Load the pipeline.

        Args:
            options: of the model, and the defaults of all pictures.

        Raises:
            ValueError: the model is missing or damaged, or an option does not fit it.
        """
        self.defaults = resolve_options(options)
        self._options = options
        self._pipe = load_pipeline(options)
        self._lock = Lock()
        self._unmerged: dict[tuple[str, ResolvedOptions], Picture] = {}

    def prompts(self) -> list[str]:
        """The prompts of the model's classes, or of all 1,000 of ImageNet."""
        return [job.prompt for job in plan_images(replace(self.defaults, images_per_class=1))]

    def settings(self, merging: MergeConfig | None = None, **values: Any) -> ResolvedOptions:
        """The settings of a picture, checked before anything is generated.

        Args:
            merging: how tokens are merged; None: not at all.
            values: fields of `GenerateOptions`, such as `seed`, `height`, `width` and `steps`; None
                for the model's own.

        Raises:
            TypeError: a value is of the wrong type.
            ValueError: a value is out of range, or does not fit the model or its attention.
        """
        settings = resolve_options(replace(self._options, merging=merging, **values))
        with self._lock:
            Sampler(self._pipe, settings)
            require_whole_tokens(self._pipe, settings)
            try:
                with patched(self._pipe, settings):
                    return settings
            except RuntimeError as error:  # the model, as it was loaded, can't be merged like this
                raise ValueError(str(error)) from error

    def unmerged(self, prompt: str, settings: ResolvedOptions, on_step: OnStep) -> Picture:
        """The picture without merging, generated only if it is not among the last ones.

        Args:
            prompt: the prompt.
            settings: from `settings`; their merging is ignored.
            on_step: follows the generation.

        Raises:
            NotANumberError: the picture has NaN pixels.
        """
        settings = replace(settings, merging=None)
        key = prompt, settings
        with self._lock:
            if key not in self._unmerged:
                with _watched(self._pipe, on_step):
                    picture = Picture(*single_picture(*self._request(prompt, settings)))
                while len(self._unmerged) >= _CACHED_PICTURES:
                    del self._unmerged[next(iter(self._unmerged))]
                self._unmerged[key] = picture
            return self._unmerged[key]

    def merged(self, prompt: str, settings: ResolvedOptions, on_step: OnStep) -> MergedPicture:
        """Generate the picture with merging.

        Arguments and errors are those of `unmerged`.

        Raises:
            ValueError: the settings have no merging.
        """
        if settings.merging is None:
            raise ValueError("`settings` must have `merging`, got None.")
        with self._lock, patched(self._pipe, settings) as handle, _watched(self._pipe, on_step):
            sampler, job = self._request(prompt, settings)
            image, seconds, recording = recorded_picture(handle, sampler, job)
            share = product_share(settings.merging, recording, handle.report())
        return MergedPicture(image, seconds, recording, share)

    def _request(self, prompt: str, settings: ResolvedOptions) -> tuple[Sampler, ImageJob]:
        return Sampler(self._pipe, settings), ImageJob(0, 0, settings.seed, prompt)


def difference(image: Image.Image, original: Image.Image) -> Image.Image:
    """The absolute difference of two RGB pictures times `DIFFERENCE_GAIN`, at most 255."""
    return ImageChops.difference(image, original).point(lambda value: DIFFERENCE_GAIN * value)


def product_share(config: MergeConfig, recording: Recording, report: Report) -> float:
    """Products of queries and keys in the merged attentions, relative to those without merging.

    With N tokens and K clusters, text tokens among both, unmerged attention has N^2 products;
    `docs/forms.md` lists those of each form. Attentions that are never merged do not count.

    Args:
        config: how tokens were merged.
        recording: of the whole generation.
        report: after it.

    Returns:
        The share, above 0; 1 if nothing was merged. `"two-sided"` can exceed 1.
    """
    computed = unmerged = 0
    for row in report.rows:
        if row.merged and row.tokens_before is not None:
            tokens = row.tokens_before + row.text_tokens
            for step in recording.steps:
                partition = step.partitions.get(row.block)
                unmerged += tokens**2
                computed += (
                    tokens**2
                    if partition is None
                    else _products(config.merge, tokens, partition.num_clusters + row.text_tokens)
                )
    return computed / unmerged


def _products(merge: str, tokens: int, clusters: int) -> int:
    """Products of one attention to clusters."""
    if merge == "qkv":
        return clusters**2
    if merge == "two-sided":
        return 2 * tokens * clusters + clusters**2
    return tokens * clusters


@contextmanager
def _watched(pipe: Any, on_step: OnStep) -> Iterator[None]:
    """Call `on_step` after each call of the pipeline's denoiser."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        total = len(pipe.scheduler.timesteps)
        on_step(min(done, total), total)  # some pipelines call it twice in each step

    hook = find_denoiser(pipe).register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
