"""One merged block: its token grid, its input, and the choice of its partition.

A self-attention gets neither grid nor block input, so pre-hooks on the transformer and the block
record them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.partitions import Partition, clusters_to_keep
from sd_tokenmerge.patching.compiled import choose_in_graph, is_in_backward
from sd_tokenmerge.patching.families import ReadGrid
from sd_tokenmerge.patching.features import received_attention
from sd_tokenmerge.patching.one_thread import OneThread
from sd_tokenmerge.patching.reuse import BlockPartitions, PartitionReuse
from sd_tokenmerge.patching.sites import Site

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def read_image_grid(model: Any, args: Arguments, kwargs: Mapping[str, Any]) -> Grid:
    """The grid of a UNet's inner transformer: its input is an image, `[B, C, H, W]`."""
    image = args[0] if args else kwargs["hidden_states"]
    return Grid(image.shape[-2], image.shape[-1])


class GridRecorder:
    """The token grid of the image or video that runs through one transformer.

    Attributes:
        grid: of the current run; None while the transformer does not run.
        last_grid: of the latest run.
        thread: the thread of the latest run.
    """

    grid: Grid | None = None
    last_grid: Grid | None = None

    def __init__(self, read: ReadGrid) -> None:
        """Record what `read` returns."""
        self.thread = OneThread()
        self._read = read

    def begin(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the transformer."""
        self.thread.enter()
        self.grid = self.last_grid = self._read(module, args, kwargs)

    def end(self, module: Any, args: Arguments, output: Any) -> None:
        """Forward hook of the transformer."""
        self.thread.require()
        self.grid = None


class DenoiserGridRecorder(GridRecorder):
    """A recorder on the denoiser itself, which runs outside of its compiled graph."""

    begin = torch.compiler.disable(GridRecorder.begin)  # type: ignore[no-untyped-call]
    end = torch.compiler.disable(GridRecorder.end)  # type: ignore[no-untyped-call]


def _identity(tokens: Tensor) -> Tensor:
    return tokens


@dataclass(frozen=True)
class SelfAttentionInputs:
    """What a method can read of a self-attention.

    Attributes:
        batch: B, the number of images.
        num_tokens: N.
        query: computes the queries, `[B, H, N, D]`.
        key: computes the keys, `[B, H, N, D]`.
        scale: factor on their products.
        padding_first: moves the padding at the end of a sequence `[B, ..., N, C]` to its beginning.
    """

    batch: int
    num_tokens: int
    query: Callable[[], Tensor]
    key: Callable[[], Tensor]
    scale: float
    padding_first: Callable[[Tensor], Tensor] = _identity


class MergedBlock:
    """Chooses the partition of one block in each call of the denoiser.

    Attributes:
        config: how tokens are merged.
        corrects_to_first_order: `config.corrects_to_first_order`.
        path: the block's name.
        partitions: the block's partitions.
        recorder: records the grid of the block's transformer.
        merges_input: of the block's `Site`.
        processors: of the block's `Site`.
        rate: the keep rate in this call of the denoiser.
        text_tokens: that joined the image's in the latest call of the attention.
    """

    text_tokens: int = 0

    def __init__(
        self,
        config: MergeConfig,
        reuse: PartitionReuse,
        partitions: BlockPartitions,
        recorder: GridRecorder,
        keep_rate: KeepRate,
        depth: float,
        site: Site,
    ) -> None:
        """Merge in one block.

        Args:
            config: how tokens are merged.
            reuse: decides whether a partition is computed.
            partitions: the block's entry in `reuse.blocks`.
            recorder: of the block's transformer.
            keep_rate: fraction of the tokens that is kept.
            depth: the block's place among the merged blocks, in [0, 1].
            site: the self-attention; not kept, as it holds modules.
        """
        self.config = config
        self.corrects_to_first_order = config.corrects_to_first_order
        self.reuse = reuse
        self.partitions = partitions
        self.recorder = recorder
        self.merges_input = site.merges_input
        self.processors = site.processors
        self._order = site.order
        self.path = partitions.path
        self.keep_rate = keep_rate
        self._depth = depth
        # Dynamo specialises on strings, but makes floats symbolic.
        self._rate = repr(keep_rate.at(0.0, depth))
        self._input: Tensor | None = None
        self._forget_inputs()

    @property
    def rate(self) -> float:
        """The keep rate in this call of the denoiser."""
        return float(self._rate)

    def set_progress(self, progress: float) -> None:
        """Note the progress of the denoising, in [0, 1)."""
        self._rate = repr(self.keep_rate.at(progress, self._depth))

    def record_input(self, module: Any, args: Arguments, kwargs: Keywords) -> None:
        """Forward pre-hook of the block: ToMe-SD and ATC cluster its input, before the norm."""
        self._require_one_thread()
        self._input = args[0] if args else kwargs["hidden_states"]

    @property
    def ends_with_padding(self) -> bool:
        """Whether padding follows the image where texts of a batch differ in length."""
        return self._order == "text-image-padding"

    @property
    def has_text(self) -> bool:
        """Whether text tokens join the image's in the attention."""
        return self._order != "image"

    def image_tokens(self, length: int, num_tokens: int | None = None) -> slice:
        """The place of the image's tokens among those of the attention, any padding coming first.

        Args:
            length: how many tokens the attention has, text included.
            num_tokens: how many are the image's; None: those of the transformer's grid.
        """
        if num_tokens is None:
            grid = self.recorder.grid
            num_tokens = length if grid is None else grid.num_tokens
        if self._order == "image" or num_tokens > length:
            return slice(0, length)
        return (
            slice(0, num_tokens)
            if self._order == "image-text"
            else slice(length - num_tokens, length)
        )

    def choose(self, inputs: SelfAttentionInputs) -> Partition | None:
        """The partition of the attention's tokens; None to keep every token.

        Raises:
            RuntimeError: the block runs outside its transformer, or the attention outside its
                block, or another thread calls the denoiser.
            ValueError: the tokens don't fill the grid, or the method can't reach the keep rate.
        """
        self._require_one_thread()
        block_input, self._input = self._input, None
        if torch.compiler.is_compiling():
            return self._choose(inputs, block_input)
        if is_in_backward():
            return self._choose_again(inputs, block_input)
        partition = self._choose(inputs, block_input)
        if torch.is_grad_enabled() and block_input is not None:
            self._chosen_for[block_input] = partition
        return partition

    def _choose_again(
        self, inputs: SelfAttentionInputs, block_input: Tensor | None
    ) -> Partition | None:
        """The partition of the forward pass that gradient checkpointing recomputes.

        If blocks are checkpointed, the block gets the same tensor object as in the forward pass. If
        larger parts are, that tensor is recomputed, and the partition can be computed again only if
        it depends on nothing but the block's features and grid.
        """
        if block_input is not None and block_input in self._chosen_for:
            chosen: Partition | None = self._chosen_for[block_input]
            return chosen
        is_pure = not self.reuse.needs_call and not self.keep_rate.varies_over_steps
        if is_pure and self.recorder.grid is not None:
            return self._choose(inputs, block_input)
        raise RuntimeError(
            f"{self.path} is recomputed during backward from a tensor that it did not get in the "
            "forward pass, so its partition is unknown: use the model's own gradient checkpointing "
            "with use_reentrant=False and without saved-tensor hooks."
        )

    def _choose(self, inputs: SelfAttentionInputs, block_input: Tensor | None) -> Partition | None:
        grid = self.recorder.grid
        if grid is None:
            raise RuntimeError(f"{self.path} must be run by its transformer.")
        if grid.num_tokens != inputs.num_tokens:
            raise ValueError(
                f"the tokens of {self.path} must fill its transformer's {grid} grid, "
                f"got {inputs.num_tokens}."
            )
        num_clusters = clusters_to_keep(inputs.num_tokens, self.rate)
        if num_clusters == inputs.num_tokens:
            return None

        def features() -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                scores = None
                if self.reuse.method.uses_scores:
                    scores = received_attention(inputs.query(), inputs.key(), inputs.scale)
                if self.config.features == "keys":
                    return inputs.key().mean(1), scores
                if block_input is None:
                    raise RuntimeError(f"{self.path} must run its self-attention itself.")
                tokens = inputs.padding_first(block_input)
                return tokens[:, self.image_tokens(tokens.shape[1])].detach(), scores

        if torch.compiler.is_compiling():
            method, ticket = self.reuse.method, self.partitions.ticket
            return choose_in_graph(method, ticket, grid, num_clusters, features)
        return self.reuse.choose(self.partitions, grid, inputs.batch, num_clusters, features)

    def _require_one_thread(self) -> None:
        # autograd has threads of its own, and recomputes blocks without their transformers
        if not torch.compiler.is_compiling() and not is_in_backward():
            self.recorder.thread.require()
            self.reuse.thread.require()

    def _forget_inputs(self) -> None:
        """Drop the partitions kept for backward passes, by block input."""
        self._chosen_for = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without inputs."""
        state = dict(self.__dict__)
        del state["_chosen_for"]
        return state | {"_input": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_inputs()
