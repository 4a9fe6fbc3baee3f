"""One call of the denoiser: its place in the denoising, found from its timestep.

A step is an entry of the scheduler's `timesteps`. Pipelines call the denoiser with an element of
that tensor, so the element's place in memory tells the generation (each makes new `timesteps`) and
the step, without waiting for the device. Any other timestep is looked up in the scheduler by value.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass
class DenoiserCall:
    """One call of the denoiser, from its beginning to its end.

    Attributes:
        step: entries of the scheduler's `timesteps` since the generation began.
        number: calls made before this one in the same step; guidance can need several.
        progress: index of the step / number of the scheduler's timesteps, in [0, 1); None without
            a scheduler.
        timesteps: the distinct timesteps of the batch, ascending; empty if no method draws from
            them.
        runs: how many times each block has run in this call, by its name.
    """

    step: int = 0
    number: int = 0
    progress: float | None = None
    timesteps: tuple[float, ...] = ()
    runs: Counter[str] = field(default_factory=Counter)


class SchedulerOf:
    """The current scheduler of a pipeline, which may be replaced at any time.

    A deep copy of the pipeline refers to the copy. A copy of the denoiser alone has no scheduler.
    """

    def __init__(self, pipe: object) -> None:
        """Refer to a pipeline; an object without a scheduler counts as None."""
        self._pipe: Any = weakref.ref(pipe) if hasattr(pipe, "scheduler") else _nothing

    @property
    def is_known(self) -> bool:
        """Whether there is a scheduler."""
        return self._pipe() is not None

    @property
    def timesteps(self) -> Tensor | None:
        """The scheduler's `timesteps`, `[S]`; None without a scheduler, and before they are set."""
        timesteps = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerOf:
        copied = SchedulerOf(None)
        copy_of_pipe = memo.get(id(self._pipe()))
        if copy_of_pipe is not None:
            copied._pipe = weakref.ref(copy_of_pipe)
        return copied

    def __reduce__(self) -> Any:
        return SchedulerOf, (None,)


def _nothing() -> None:
    return None


class CallLog:
    """Creates the `DenoiserCall` of each call, by comparing it with the call before."""

    def __init__(
        self,
        scheduler: SchedulerOf,
        *,
        scheduler_timestep: Callable[[float], float] | None = None,
        needs_step: bool,
        needs_progress: bool,
        needs_values: bool,
    ) -> None:
        """Start without a call.

        Args:
            scheduler: of the pipeline.
            scheduler_timestep: the scheduler's timestep, up to rounding, from the denoiser's;
                None: they are equal.
            needs_step: whether `step` and `number` are used.
            needs_progress: whether `progress` is used.
            needs_values: whether `timesteps` are used.
        """
        self._scheduler = scheduler
        self._scheduler_timestep = scheduler_timestep
        self._needs = (needs_step, needs_progress, needs_values)
        self._previous: _Position | None = None
        self._step = self._number = 0
        self._listed: _Listed | None = None

    def begin(self, timestep: Tensor | float) -> DenoiserCall:
        """Describe the call that is made with this timestep.

        Args:
            timestep: a number, or a tensor with one element or one per image.

        Raises:
            RuntimeError: the step is needed and can't be told from the timestep.
        """
        call, (needs_step, needs_progress, needs_values) = DenoiserCall(), self._needs
        if needs_values:
            call.timesteps = tuple(sorted(set(self._read(timestep))))
        if needs_step:
            self._follow(self._locate(timestep))
            call.step, call.number = self._step, self._number
        if needs_progress:
            timesteps = self._scheduler.timesteps
            if timesteps is None:
                raise _unknown_step(timestep)
            call.progress = self._index(timestep, timesteps) / len(timesteps)
        return call

    def _follow(self, position: _Position) -> None:
        before, self._previous = self._previous, position
        if (
            before is None
            or before.generation != position.generation
            or position.offset < before.offset
        ):
            self._step = self._number = 0
        elif position.offset == before.offset:
            self._number += 1
        else:
            self._step, self._number = self._step + 1, 0

    def _locate(self, timestep: Tensor | float) -> _Position:
        if isinstance(timestep, Tensor) and _is_element(timestep):
            return _Position(_identity(timestep), int(timestep.storage_offset()), timestep)
        timesteps = self._scheduler.timesteps
        if timesteps is not None:
            return _Position(_identity(timesteps), self._index(timestep, timesteps), timesteps)
        if not isinstance(timestep, Tensor):
            raise _unknown_step(timestep)
        # a generation of its own: nothing is reused
        return _Position(_identity(timestep), 0, timestep)

    def _index(self, timestep: Tensor | float, timesteps: Tensor) -> int:
        """The index of a timestep among the scheduler's."""
        if isinstance(timestep, Tensor) and _shares_memory(timestep, timesteps):
            distance = int(timestep.storage_offset() - timesteps.storage_offset())
            return distance // int(timesteps.stride(0))
        values = self._list(timesteps)
        given = set(self._read(timestep))
        if self._scheduler_timestep is not None:
            given = {_nearest(self._scheduler_timestep(value), values) for value in given}
        value = max(given)  # the noisiest image of a batch decides
        if value not in values:
            raise RuntimeError(
                "the denoiser must be called with one of the scheduler's timesteps, so that "
                f"merging knows the step; got {value:g}, which is not among them."
            )
        return values.index(value)

    def _read(self, timestep: Tensor | float) -> list[float]:
        """The timestep's values; those of a scheduler wait for the device once per generation."""
        if not isinstance(timestep, Tensor):
            return [float(timestep)]
        timesteps = self._scheduler.timesteps
        if timesteps is not None and _shares_memory(timestep, timesteps):
            return [self._list(timesteps)[self._index(timestep, timesteps)]]
        return [float(value) for value in timestep.flatten().tolist()]

    def _list(self, timesteps: Tensor) -> list[float]:
        identity = _identity(timesteps)
        if self._listed is None or self._listed.identity != identity or timesteps.is_inference():
            self._listed = _Listed(identity, [float(t) for t in timesteps.tolist()], timesteps)
        return self._listed.values

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without calls."""
        return self.__dict__ | {"_previous": None, "_step": 0, "_number": 0, "_listed": None}


def _nearest(value: float, values: list[float]) -> float:
    """The entry of `values` that was rounded to `value`; `value` itself if none is near enough."""
    first, *others = sorted(set(values), key=lambda known: abs(known - value))
    is_near = not others or 4 * abs(first - value) < abs(others[0] - value)
    return first if is_near else value


class _Position(NamedTuple):
    generation: tuple[int, int]
    """Identity of the tensor that holds the generation's timesteps."""
    offset: int
    tensor: Tensor
    """Kept alive, so that no later tensor gets its address."""


class _Listed(NamedTuple):
    identity: tuple[int, int]
    values: list[float]
    tensor: Tensor
    """Kept alive, so that no later tensor gets its address."""


def _is_element(timestep: Tensor) -> bool:
    """Whether a timestep is one element of a tensor with several, possibly expanded."""
    is_one = timestep.numel() == 1 or not any(timestep.stride())
    return is_one and timestep.untyped_storage().nbytes() > timestep.element_size()


def _shares_memory(timestep: Tensor, timesteps: Tensor) -> bool:
    return _is_element(timestep) and _identity(timestep) == _identity(timesteps)


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Address and version: changes when the tensor is replaced or updated in place."""
    version = -1 if tensor.is_inference() else int(tensor._version)
    return int(tensor.untyped_storage().data_ptr()), version


def _unknown_step(timestep: Tensor | float) -> RuntimeError:
    given = list(timestep.shape) if isinstance(timestep, Tensor) else repr(timestep)
    return RuntimeError(
        "merging must know the denoising step (for `refresh_every` above 1, and for keep rates "
        "that change over the steps): patch the pipeline instead of its UNet, or call the UNet "
        f"with elements of the scheduler's `timesteps`; got {given}."
    )
