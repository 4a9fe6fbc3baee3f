"""What users would do instead of merging: caches over denoising steps. And counting products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from DeepCache import DeepCacheSDHelper
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sd_tokenmerge.bench.calls import finest_transformers


def finest_attentions(unet: Any) -> dict[str, nn.Module]:
    """The self-attentions at the finest level, which merging changes by default, by name."""
    transformers = finest_transformers(unet)[1]
    found = {block.attn1 for one in transformers for block in one.transformer_blocks}
    return {name: module for name, module in unet.named_modules() if module in found}


@dataclass(frozen=True)
class AttentionReuse:
    """Self-attention's output at the finest level reused: diffusers' pyramid attention broadcast.

    Attributes:
        every: steps that share an output; the first of them computes it.
    """

    every: int

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        """Reuse outputs for as long as the context lasts."""
        attentions = finest_attentions(pipe.unet)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.every,
            spatial_attention_timestep_skip_range=(-1, 1),  # always: the callback says 0
            spatial_attention_block_identifiers=tuple(f"^{re.escape(n)}$" for n in attentions),
            current_timestep_callback=lambda: 0,
        )
        apply_pyramid_attention_broadcast(pipe.unet, config)

        def start_anew(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments[1] == pipe.scheduler.timesteps[0]:
                for attention in attentions.values():
                    attention._diffusers_hook.reset_stateful_hooks(recurse=False)

        hook = pipe.unet.register_forward_pre_hook(start_anew)
        try:
            yield
        finally:
            hook.remove()
            for attention in attentions.values():
                del attention._diffusers_hook, attention.forward


@dataclass(frozen=True)
class DeepCache:
    """The DeepCache package: most of the UNet's output reused.

    Attributes:
        every: steps that share it; the first of them computes it.
        branch: number of the skip connection inside which the UNet is computed in every step; 0 is
            the outermost, the package's default.
    """

    every: int
    branch: int = 0

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        """Reuse for as long as the context lasts."""
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.every, cache_branch_id=self.branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()
            for module in pipe.unet.modules():  # the helper leaves the methods it restored there
                vars(module).pop("forward", None)


class ProductCounter(TorchFunctionMode):
    """Counts products of queries and keys in the self-attentions at the finest level.

    Attributes:
        products: so far, of all heads.
    """

    def __init__(self, unet: Any) -> None:
        """Prepare to count in `unet`."""
        super().__init__()
        self.products = 0
        self._unet, self._depth = unet, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count for as long as the context lasts."""

        def enter(*_: object) -> None:
            self._depth += 1

        def leave(*_: object) -> None:
            self._depth -= 1

        with ExitStack() as stack:
            for attention in finest_attentions(self._unet).values():
                stack.callback(attention.register_forward_pre_hook(enter).remove)
                stack.callback(attention.register_forward_hook(leave).remove)
            stack.enter_context(self)
            yield

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Count one call of attention; all functions do what they did."""
        if self._depth and function is scaled_dot_product_attention:
            query, key = arguments[:2]
            self.products += query.shape[:-1].numel() * key.shape[-2]
        return function(*arguments, **(keywords or {}))


def count_products(unet: Any, run: Any) -> int:
    """Products of queries and keys at the finest level while `run()` generates."""
    counter = ProductCounter(unet)
    with counter.counting(), torch.no_grad():
        run()
    return counter.products
