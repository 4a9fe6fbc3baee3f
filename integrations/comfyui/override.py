"""Merged attention in the form of ComfyUI's `optimized_attention_override`. Imports no ComfyUI."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from sd_tokenmerge.attend import attend
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.methods import Grid
from sd_tokenmerge.partitions import Partition, clusters_to_keep
from sd_tokenmerge.patching.features import received_attention

Form = Literal["kv", "two-sided"]
FORMS: tuple[Form, ...] = get_args(Form)

_POSITIONAL = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""ComfyUI's attention functions take these by position or name, after q, k, v and heads."""
_IGNORED = ("transformer_options", "_inside_attn_wrapper", "low_precision_attention", "enable_gqa")
"""Arguments that change no result here; grouped queries are refused by their keys' shape."""
_PATCH_SIZES = (1, 2)
"""Sides of a token in latent pixels; tried in this order."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ImageTokens:
    """The image tokens of a sequence, `[start, end)`, and their grid if it is known."""

    start: int
    end: int
    grid: Grid | None


@dataclass
class _Reused:
    partition: Partition
    calls_left: int


class MergedAttention:
    """Attention with merged keys and values of the image tokens; all other tokens are kept.

    An instance is the value of `transformer_options["optimized_attention_override"]`. Its methods
    `sample` and `apply_model` are ComfyUI's wrappers of the same names. A call that can't be merged
    is computed by the previous override, or by ComfyUI; each reason is logged once.

    Args:
        method: a method string, such as `"atc"`; it clusters keys, averaged over heads.
        keep_rate: fraction of the image tokens that is kept, in (0, 1].
        merge: `"kv"` or `"two-sided"`, see `sd_tokenmerge.attend`.
        refresh_every: calls of a layer that share clusters, at least 1. A layer has one call per
            model call; samplers of second order call the model twice per step.
        min_tokens: sequences with fewer image tokens are not merged; at least 1.
        previous: the override that was set before, or None.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range, the method string is invalid, or the method can't
            reach the keep rate.
    """

    def __init__(
        self,
        method: str,
        keep_rate: float,
        merge: Form,
        refresh_every: int,
        min_tokens: int,
        previous: Callable[..., Tensor] | None = None,
    ) -> None:
        if merge not in FORMS:
            raise ValueError(f"`merge` must be one of {', '.join(FORMS)}, got {merge!r}.")
        if min_tokens < 1:
            raise ValueError(f"`min_tokens` must be at least 1, got {min_tokens}.")
        self.config = MergeConfig(
            method, keep_rate=keep_rate, merge=merge, features="keys", refresh_every=refresh_every
        )
        self.method = self.config.parsed_method
        self.keep_rate = keep_rate
        self.method.require_reachable(clusters_to_keep(64 * 64, keep_rate), Grid(64, 64))
        self.min_tokens = min_tokens
        self.previous = previous
        self.outcomes: Counter[str] = Counter()
        """Number of attention calls of the current generation: merged, or dense by reason."""
        self._logged: set[str] = set()
        self._latent_shape: tuple[int, ...] = ()
        self.reset()

    def __deepcopy__(self, memo: object) -> MergedAttention:
        """Itself: ComfyUI copies a model's options deeply, but not its wrappers."""
        return self

    def reset(self) -> None:
        """Forget all clusters."""
        self._reused: dict[tuple[Any, ...], _Reused] = {}
        self._draws = 0
        self._calls = 0

    def sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One generation (`WrappersMP.OUTER_SAMPLE`): starts and ends without clusters."""
        self.reset()
        self.outcomes.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            self.reset()
            logger.info("Token merging, attention calls: %s", dict(self.outcomes))

    def apply_model(
        self, executor: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """One call of the model (`WrappersMP.APPLY_MODEL`) with latents `[B, C, (T,) H, W]`."""
        self._latent_shape = tuple(x.shape)
        self._calls = 0
        return executor(x, *args, **kwargs)

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """One attention.

        Args:
            func: ComfyUI's attention function.
            q: `[B, N, H * D]`, or `[B, H, N, D]` with `skip_reshape`.
            k: like `q`; other lengths are not merged.
            v: like `k`.
            heads: H.
            args: `mask`, `attn_precision`, `skip_reshape`, `skip_output_reshape`.
            kwargs: the same by name, and `transformer_options`.

        Returns:
            `[B, N, H * D]`, or `[B, H, N, D]` with `skip_output_reshape`.
        """
        call, self._calls = self._calls, self._calls + 1
        given = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
        query, key, value = (
            tokens if given.get("skip_reshape") else _split_heads(tokens, heads)
            for tokens in (q, k, v)
        )
        options = given.get("transformer_options") or {}
        image = self._find_image(query, key, value, given, options)
        partition = (
            image
            if isinstance(image, str)
            else self._choose(query, key, image, options, call, given.get("scale"))
        )
        if isinstance(partition, str):
            self._count_dense(partition)
            if self.previous is not None:
                return self.previous(func, q, k, v, heads, *args, **kwargs)
            return func(q, k, v, heads, *args, **kwargs)
        self.outcomes["merged"] += 1
        output = attend(
            query,
            key,
            value,
            partition,
            merge=self.config.merge,
            sizes=True,
            first_order=self.config.corrects_to_first_order,
            scale=given.get("scale"),
        )
        return output if given.get("skip_output_reshape") else output.transpose(1, 2).flatten(2)

    def _find_image(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> _ImageTokens | str:
        """Where the image tokens are, or why this call is not merged."""
        if not query.shape == key.shape == value.shape:
            return "cross-attention, or keys in another shape than queries"
        if given.get("mask") is not None:
            return "there is a mask"
        unknown = set(given) - {*_POSITIONAL, *_IGNORED, "scale"}
        if unknown:
            return f"unknown arguments: {', '.join(sorted(unknown))}"
        image = self._locate(query.shape[0], query.shape[2], options)
        if not isinstance(image, str) and image.end - image.start < self.min_tokens:
            return f"fewer than {self.min_tokens} image tokens"
        return image

    def _locate(self, batch: int, count: int, options: Mapping[str, Any]) -> _ImageTokens | str:
        if "activations_shape" in options:  # set by the spatial transformers of UNets
            images, _, height, width = options["activations_shape"]
            if (batch, count) != (images, height * width):
                return "not the attention among all tokens of an image in a UNet"
            return _ImageTokens(0, count, Grid(height, width))
        if "img_slice" in options:
            start, end = options["img_slice"]
            if not 0 <= start < end <= count:
                return "`img_slice` does not belong to this sequence"
            return _ImageTokens(start, end, self._latent_grid(end - start))
        grid = self._latent_grid(count)
        if grid is None:
            return "it is not known which tokens are of the image"
        return _ImageTokens(0, count, grid)

    def _latent_grid(self, count: int) -> Grid | None:
        """The grid of the latent's patches if they number `count`."""
        if len(self._latent_shape) < 4:
            return None
        *frames, height, width = self._latent_shape[2:]
        for size in _PATCH_SIZES:
            grid = Grid(math.ceil(height / size), math.ceil(width / size), math.prod(frames))
            if grid.num_tokens == count:
                return grid
        return None

    def _choose(
        self,
        query: Tensor,
        key: Tensor,
        image: _ImageTokens,
        options: Mapping[str, Any],
        call: int,
        scale: float | None,
    ) -> Partition | str:
        """The partition of all tokens in this layer and these conditions, or why there is none."""
        conditions = options.get("uuids") or options.get("cond_or_uncond") or ()
        block = [options.get(name) for name in ("block", "block_type", "block_index")]
        place = (*conditions, *block, call, image, tuple(key.shape), key.device)
        reused = self._reused.get(place)
        if reused is not None and reused.calls_left > 0:
            reused.calls_left -= 1
            return reused.partition
        if image.grid is None and self.method.uses_grid:
            return f"{self.method} needs the grid of the image tokens, which is not known"
        partition = self._cluster(query, key, image, scale)
        if not isinstance(partition, str):
            self._reused[place] = _Reused(partition, self.config.refresh_every - 1)
        return partition

    def _cluster(
        self, query: Tensor, key: Tensor, image: _ImageTokens, scale: float | None
    ) -> Partition | str:
        count = image.end - image.start
        grid = image.grid or Grid(1, count)
        num_clusters = clusters_to_keep(count, self.keep_rate)
        try:
            self.method.require_reachable(num_clusters, grid)
        except ValueError as error:
            return str(error)
        tokens = slice(image.start, image.end)
        keys, scores = key[:, :, tokens], None
        if self.method.uses_scores:
            factor = key.shape[-1] ** -0.5 if scale is None else scale
            scores = received_attention(query[:, :, tokens], keys, factor)
        self._draws += 1
        partition: Partition = self.method(
            keys.mean(1), num_clusters, grid=grid, seed=self._draws, scores=scores
        )
        return partition.with_singletons(image.start, key.shape[2] - image.end)

    def _count_dense(self, reason: str) -> None:
        self.outcomes[f"dense: {reason}"] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("Token merging: dense attention, because %s.", reason)


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """`[B, N, H * D] -> [B, H, N, D]`."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)
