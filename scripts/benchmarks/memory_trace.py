"""Memory of tensors during a call of a UNet, and the module that runs at the peak."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

_MODULE, _ATTENTION = "module:", "self-attention:"


@dataclass(frozen=True)
class Span:
    """An event from `start` to `end`, in nanoseconds."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class MemoryTrace:
    """Memory during a call, beyond that before it.

    Attributes:
        times: of allocations and releases, in nanoseconds, ascending.
        live: bytes allocated after each.
        spans: the modules that ran.
    """

    times: list[int]
    live: list[int]
    spans: list[Span]

    @property
    def peak(self) -> int:
        """Peak bytes of tensors."""
        return max(self.live, default=0)

    @property
    def peak_module(self) -> str:
        """The innermost module that ran at the peak; empty if none did."""
        if not self.live:
            return ""
        when = self.times[self.live.index(self.peak)]
        around = [
            span
            for span in self.spans
            if span.name.startswith(_MODULE) and span.start <= when <= span.end
        ]
        innermost = min(around, key=lambda span: span.end - span.start, default=None)
        return innermost.name.removeprefix(_MODULE) if innermost else ""

    @property
    def attention(self) -> int:
        """Largest growth of memory in one of the watched self-attentions, in bytes."""
        watched = [span for span in self.spans if span.name.startswith(_ATTENTION)]
        return max((self._growth(span) for span in watched), default=0)

    def _growth(self, span: Span) -> int:
        first, last = bisect_right(self.times, span.start), bisect_right(self.times, span.end)
        before = self.live[first - 1] if first else 0
        return max(self.live[first:last], default=before) - before


def trace_memory(call: Callable[[], object], device: torch.device) -> MemoryTrace:
    """Trace what PyTorch allocates on a device during a call; other libraries are not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler.kineto_results
    spans, changes = [], []
    for event in results.events():
        name, start = event.name(), event.start_ns()
        if name == "[memory]":
            if event.device_type().name.lower() == device.type:
                changes.append((start, event.nbytes()))
        elif name.startswith((_MODULE, _ATTENTION)):
            spans.append(Span(name, start, start + event.duration_ns()))
    changes.sort(key=lambda change: change[0])
    live = list(accumulate(size for _, size in changes))
    return MemoryTrace([start for start, _ in changes], live, spans)


@contextmanager
def watched(unet: nn.Module, blocks: Sequence[Any]) -> Iterator[None]:
    """Make traces show when each module runs, and the self-attentions of some transformer blocks.

    A self-attention is watched from the start of its block to the norm after it: the norm before
    it, choosing clusters, merging, attention, unmerging, and the sum with the block's input.
    """
    with ExitStack() as hooks:
        for name, module in unet.named_modules():
            _watch(hooks, _MODULE + name, module)
        for index, block in enumerate(blocks):
            _watch(hooks, f"{_ATTENTION}{index}", block, until=block.norm2)
        yield


def _watch(hooks: ExitStack, name: str, module: nn.Module, until: nn.Module | None = None) -> None:
    running: list[record_function] = []

    def begin(*_: object) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(begin, prepend=True)]
    if until is None:
        handles.append(module.register_forward_hook(end))
    else:
        handles.append(until.register_forward_pre_hook(end, prepend=True))
    for handle in handles:
        hooks.callback(handle.remove)
