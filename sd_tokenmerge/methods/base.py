"""What a merging method is: tokens in, `Partition` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from sd_tokenmerge.partitions import Partition

_LARGEST = 1e15


class Grid(NamedTuple):
    """Height and width of an image in tokens.

    Token `i` is at row `i // width` and column `i % width`.
    """

    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """N = height * width."""
        return self.height * self.width


class Method(ABC):
    """A hard merging method; subclasses are frozen dataclasses whose fields are its options.

    A subclass gives a `name`, its options as fields (bool, int, float or a `Literal` of strings,
    each with a default) and `_cluster`. It must be a pure function of its arguments: it must not
    depend on the other images of the batch, and draws random numbers only from `seed`, the same for
    every image, so that batch size and order never change a result.
    """

    name: ClassVar[str]
    order_free: ClassVar[bool] = False
    """Whether permuting the tokens just permutes their labels: neither place nor order matters."""

    @property
    def uses_seed(self) -> bool:
        """Whether the result depends on `seed`."""
        return False

    @property
    def uses_tokens(self) -> bool:
        """Whether the result depends on what the tokens are, and not only on how many."""
        return True

    @property
    def uses_scores(self) -> bool:
        """Whether `scores` (significance of each token) must be given."""
        return False

    @property
    def has_representatives(self) -> bool:
        """Whether a cluster is represented by one of its tokens instead of by its mean."""
        return False

    def __post_init__(self) -> None:
        """Refuse options of the wrong type; subclasses add their ranges."""
        for option, hint in option_types(type(self)).items():
            _require_type(self.name, option, getattr(self, option), hint)

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
            tokens: `[B, N, C]`, any float dtype. Features that are not finite count as 0, because
                looking for them would wait for the device in every block of every denoising step;
                `partition` refuses them.
            num_clusters: K, in [`smallest_num_clusters(grid)`, N].
            grid: layout of the N tokens; `grid.num_tokens == N`.
            seed: what a random method draws from.
            scores: `[B, N]` non-negative significance of each token, where `uses_scores`.

        Returns:
            A partition with exactly K non-empty clusters; K = N is the identity.

        Raises:
            ValueError: K is out of the method's reach, or `scores` are missing.
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
        with torch.autocast(tokens.device.type, enabled=False):
            return self._cluster(
                _precise(tokens) if self.uses_tokens else tokens.detach(),
                num_clusters,
                grid,
                seed,
                scores,
            )

    @abstractmethod
    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        """The method itself; see `__call__`.

        `tokens` and `scores` are detached, contiguous, float32 (float64 where the caller's are),
        and finite: at most 1e15, so that sums of squares are finite too. Only where not
        `uses_tokens`, the tokens are as they come. Autocast is off, K is within reach and below N,
        and `scores` are there exactly where `uses_scores`.
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
                f"`num_clusters` must be in [{low}, {high}] for {self} on a "
                f"{grid.height}x{grid.width} grid (a keep rate of at least {low / high:.4g}), "
                f"got {num_clusters}."
            )

    def __str__(self) -> str:
        """The method string that `parse_method` reads back, options at their default left out."""
        options = [
            f"{field.name}={_spell(getattr(self, field.name))}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(options) if options else "")


def option_types(method_class: type[Method]) -> dict[str, object]:
    """The options of a method and their types, in the order of its fields."""
    hints = get_type_hints(method_class)
    return {field.name: hints[field.name] for field in fields(method_class)}  # type: ignore[arg-type]


def describe_type(hint: object) -> str:
    """How an error message names the values that an option allows.

    Raises:
        TypeError: a method may not have options of this type.
    """
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    for known, words in ((bool, "true|false"), (int, "an integer"), (float, "a number")):
        if hint is known:
            return words
    raise TypeError(f"an option must be bool, int, float or a Literal of strings, got {hint}.")


def _require_type(method: str, option: str, value: object, hint: object) -> None:
    allowed = describe_type(hint)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(
                f"`{option}` of {method} must be {describe_type(hint)}, got {value!r}."
            )
    elif type(value) is not hint and not (hint is float and type(value) is int):
        raise TypeError(f"`{option}` of {method} must be {allowed}, got {value!r}.")


def _precise(tensor: Tensor) -> Tensor:
    """A copy, detached, contiguous, at least float32, and finite, squares and sums included."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # a UNet's blocks store tokens channel by channel, of which rows are gathered slowly
    copy = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-_LARGEST, _LARGEST)


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
