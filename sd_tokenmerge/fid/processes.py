"""Several processes extract one image set: who takes which image, how all get the result."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` or `torchrun` started.

    Attributes:
        rank: number of this process.
        world: number of processes.
        device: what accelerate gave this process; None where there is only one.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None

    @classmethod
    def current(cls, device: str | torch.device | None = None) -> Processes:
        """Join the group that the environment describes; one process where it describes none.

        Args:
            device: `"cpu"` keeps accelerate from taking a GPU.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not launched and not torch.distributed.is_initialized():
            return cls()
        from accelerate import PartialState

        on_cpu = device is not None and torch.device(device).type == "cpu"
        state = PartialState(cpu=on_cpu)
        return cls(state.process_index, state.num_processes, state.device)

    def leave(self) -> None:
        """End the group, if there is one; torch warns of groups that are left standing."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes the cache."""
        return self.rank == 0

    def shard(self, total: int) -> range:
        """Indices of this process's images: every `world`-th, none padded or repeated."""
        return range(self.rank, total, self.world)

    def collect(self, shard: Tensor, total: int) -> Tensor:
        """Put the shards of all processes together, `[len(shard(total)), D] -> [total, D]`.

        Args:
            shard: rows of this process, in the order of `shard(total)`, on the CPU.
            total: number of rows in all.
        """
        if self.world == 1:
            return shard
        from accelerate.utils import gather

        longest = -(-total // self.world)
        padded = shard.new_zeros(longest, shard.shape[1])
        padded[: shard.shape[0]] = shard
        gathered: Tensor = gather(padded.to(self.device)).cpu()
        # row j of process r is image j * world + r
        rows = (
            gathered.view(self.world, longest, -1).transpose(0, 1).reshape(longest * self.world, -1)
        )
        return rows[:total].clone()

    def share(self, tensor: Tensor | None) -> Tensor | None:
        """Give every process the main process's `[N, D]` float32 tensor, or None if it has none."""
        if self.world == 1:
            return tensor
        shape = torch.tensor([0, 0] if tensor is None else tensor.shape, device=self.device)
        torch.distributed.broadcast(shape, src=0)
        rows, columns = shape.tolist()
        if rows == 0:
            return None
        values = torch.empty(rows, columns) if tensor is None else tensor
        values = values.to(self.device)
        torch.distributed.broadcast(values, src=0)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all of them must call this."""
        if self.world == 1:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(count)
        return int(count) > 0
