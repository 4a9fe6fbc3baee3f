"""The interface of merging methods: tokens in, `Partition` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.options import describe_type, option_types, require_option
from sd_tokenmerge.partitions import Partition

_LARGEST = 1e15


class Grid(NamedTuple):
    """Height and width of an image in tokens, and the number of frames of a video.

    Tokens are in row-major order, one frame after the other.
    """

    height: int
    width: int
    frames: int = 1

    @property
    def num_tokens(self) -> int:
        """N = frames * height * width."""
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width): the shape of a tensor of the tokens in their order."""
        return self.frames, self.height, self.width

    def __str__(self) -> str:
        """The height and width, after the number of frames if there are several: `2x4x6`."""
        size = f"{self.height}x{self.width}"
        return size if self.frames == 1 else f"{self.frames}x{size}"


class Method(ABC):
    """A hard merging method; subclasses are frozen dataclasses whose fields are their options.

    A subclass defines `name`, its options as fields (bool, int, float or a `Literal` of strings,
    each with a default) and `_cluster`. Its result must be a pure function of the arguments: it
    must not depend on other images of the batch, and random numbers come only from `seed`, the same
    for every image, so that batch size and order never change a result.
    """

    name: ClassVar[str]

    @property
    def uses_seed(self) -> bool:
        """Whether the result depends on `seed`."""
        return False

    @property
    def uses_tokens(self) -> bool:
        """Whether the result depends on the tokens' features, not only on their number."""
        return True

    @property
    def uses_grid(self) -> bool:
        """Whether the result depends on the grid's shape, not only on the number of tokens."""
        return False

    @property
    def uses_scores(self) -> bool:
        """Whether `scores` (the significance of each token) are required."""
        return False

    @property
    def has_representatives(self) -> bool:
        """Whether each cluster is represented by one of its tokens instead of by its mean."""
        return False

    def __post_init__(self) -> None:
        """Refuse options of the wrong type; subclasses check ranges."""
        for option, hint in option_types(type(self)).items():
            describe_type(hint)  # refuses types that no method string can hold
            label = f"`{option}` of {self.name}"
            require_option(type(self), option, getattr(self, option), label=label)

    def require_at_least(self, option: str, lowest: int) -> None:
        """Refuse an option below its range.

        Raises:
            ValueError: the option's value is below `lowest`.
        """
        value = getattr(self, option)
        if value < lowest:
            raise ValueError(f"`{option}` of {self.name} must be at least {lowest}, got {value}.")

    def __call__(
        self,
        tokens: Tensor,
        num_clusters: int,
        *,
        grid: Grid,
        seed: int = 0,
        scores: Tensor | None = None,
    ) -> Partition:
        """Cluster each image's tokens.

        Args:
            tokens: `[B, N, C]`, any float dtype. Non-finite features count as 0: finding them would
                wait for the device in every block of every denoising step. `partition` refuses
                them.
            num_clusters: K, in [`smallest_num_clusters(grid)`, N].
            grid: of the tokens; `grid.num_tokens == N`.
            seed: seed of a random method.
            scores: `[B, N]` non-negative significance of each token; required if `uses_scores`,
                otherwise ignored.

        Returns:
            A partition into exactly K non-empty clusters; the identity for K = N.

        Raises:
            ValueError: the method cannot reach K, or `scores` are missing.
        """
        self.require_reachable(num_clusters, grid)
        if not self.uses_scores:
            scores = None
        elif scores is None:
            raise ValueError(f"`scores` must be given for {self}, got None.")
        else:
            scores = _precise(scores)
        if num_clusters == grid.num_tokens:
            own = torch.arange(num_clusters, device=tokens.device).repeat(len(tokens), 1)
            return Partition(own, num_clusters, own.clone() if self.has_representatives else None)
        tokens = _precise(tokens) if self.uses_tokens else tokens.detach()
        with torch.autocast(tokens.device.type, enabled=False):
            return self._cluster(tokens, num_clusters, grid, seed, scores)

    @abstractmethod
    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        """Cluster prepared tokens; called by `__call__`, with autocast off.

        Args:
            tokens: `[B, N, C]`, a detached, contiguous copy in float32 (float64 for float64
                tokens); magnitudes are at most 1e15, so that sums of squares are finite. If not
                `uses_tokens`, the caller's tokens, detached.
            num_clusters: K, within reach and below N.
            grid: of the tokens.
            seed: seed of a random method.
            scores: `[B, N]`, prepared like the tokens; None if and only if not `uses_scores`.
        """

    def smallest_num_clusters(self, grid: Grid) -> int:
        """The smallest K that this method can reach on `grid`."""
        return 1

    def require_reachable(self, num_clusters: int, grid: Grid) -> None:
        """Refuse a K that this method cannot reach on `grid`.

        Raises:
            ValueError: K is outside [`smallest_num_clusters`, N].
        """
        low, high = self.smallest_num_clusters(grid), grid.num_tokens
        if not low <= num_clusters <= high:
            raise ValueError(
                f"`num_clusters` must be in [{low}, {high}] for {self} on a {grid} grid "
                f"(a keep rate of at least {low / high:.4g}), got {num_clusters}."
            )

    def __str__(self) -> str:
        """The method string that `parse_method` parses back, without options at their defaults."""
        options = [
            f"{field.name}={_spell(getattr(self, field.name))}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(options) if options else "")


def _precise(tensor: Tensor) -> Tensor:
    """A detached, contiguous copy in at least float32, with bounded finite values."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # UNet blocks store features channel by channel, where gathering tokens is slow
    copy = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-_LARGEST, _LARGEST)


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
