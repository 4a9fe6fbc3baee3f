"""Ways to generate a picture: steps, scheduler, merging, and other modifications."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd_tokenmerge.bench.contestants import Modification
from sd_tokenmerge.bench.turns import Cost, timed
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.load import set_scheduler
from sd_tokenmerge.sampling.merging import patched
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.progress import Progress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import RunSummary, generate
from sd_tokenmerge.sampling.sampler import Sampler


@dataclass(frozen=True)
class Recipe:
    """One way to generate a picture.

    Attributes:
        name: in rows, and of the folder of its pictures.
        config: how tokens are merged; None merges nothing.
        steps: denoising steps; None: those of the options it is used with.
        scheduler: diffusers' name of the scheduler; None: the pipeline's own.
        modification: another change to the pipeline, such as a cache.
    """

    name: str
    config: MergeConfig | None = None
    steps: int | None = None
    scheduler: str | None = None
    modification: Modification | None = None

    def options(self, base: GenerateOptions, out: str) -> GenerateOptions:
        """The options of a run of this recipe into the folder `out`."""
        return replace(
            base,
            out=out,
            merging=self.config,
            steps=base.steps if self.steps is None else self.steps,
            scheduler=self.scheduler,
        )

    @contextmanager
    def _prepared(self, pipe: Any) -> Iterator[None]:
        """Everything but merging."""
        own = pipe.scheduler
        set_scheduler(pipe, self.scheduler)
        with ExitStack() as stack:
            stack.callback(setattr, pipe, "scheduler", own)
            if self.modification is not None:
                stack.enter_context(self.modification(pipe))
            yield

    def generate(
        self, pipe: Any, base: GenerateOptions, folder: Path, progress: Progress | None = None
    ) -> RunSummary:
        """Generate the missing pictures of a run into `folder / name`.

        Args:
            pipe: from `load_pipeline`, unpatched.
            base: options of all recipes.
            folder: of all recipes' pictures.
            progress: as in `sampling.run.generate`, which also lists the errors.
        """
        with self._prepared(pipe):
            options = self.options(base, str(folder / self.name))
            return generate(options, pipe=pipe, progress=progress)

    def timed(self, pipe: Any, base: GenerateOptions, jobs: Sequence[ImageJob]) -> Cost:
        """Cost of generating one batch, which is thrown away."""
        options = resolve_options(self.options(base, "-"))
        with self._prepared(pipe), patched(pipe, options):
            sampler = Sampler(pipe, options)
            return timed(lambda: sampler(jobs))
