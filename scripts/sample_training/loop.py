"""The training loop that every stage shares: schedule, averaging, checkpoints, progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Length and step sizes of a stage.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak of a linear warm-up followed by a cosine decay to 2 % of the peak.
        warmup: steps of the warm-up.
        ema_decay: decay of the running average of the weights; 0 turns averaging off.
        save_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    ema_decay: float = 0.0
    save_every: int = 100


class Trainer:
    """Runs `loss(draw) -> scalar` for the steps of a schedule, resuming from its checkpoint.

    A stage draws its data from the number `draw` alone, which is the step for one process and
    `step * processes + rank` for several (whose gradients are averaged). So an interrupted and
    resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(self, module: nn.Module, schedule: Schedule, folder: Path, name: str) -> None:
        self.module, self.schedule, self.name = module, schedule, name
        self.path = folder / f"{name}.pt"
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if self.path.exists():
            self._load()
            print(f"{name}: resuming at step {self.step}", flush=True)

    def run(self, loss: Callable[[int], Tensor]) -> None:
        """Train to the end of the schedule and leave the averaged weights in the module."""
        device = self.parameters[0].device
        started, first, shown = time.perf_counter(), self.step, 0.0
        while self.step < self.schedule.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            draw = self.step * self.processes + self.rank
            torch.manual_seed(draw)
            value = loss(draw)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            self._share_gradients()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            self._update_average()
            shown = (
                float(value.detach()) if not shown else 0.98 * shown + 0.02 * float(value.detach())
            )
            if self.rank == 0 and (self.step % 20 == 0 or self.step == self.schedule.steps):
                elapsed = time.perf_counter() - started
                left = elapsed / (self.step - first) * (self.schedule.steps - self.step)
                print(
                    f"{self.name} {self.step}/{self.schedule.steps} on {device}: loss {shown:.4f}, "
                    f"{elapsed / (self.step - first):.2f} s/step, {left / 60:.1f} min left",
                    flush=True,
                )
            if self.step % self.schedule.save_every == 0 or self.step == self.schedule.steps:
                self._save()
        self._use_average()

    def _share_gradients(self) -> None:
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        for gradient, shared in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(shared.view_as(gradient))

    @torch.no_grad()
    def _use_average(self) -> None:
        """Put the averaged weights into the module, if averaging is on."""
        if self.schedule.ema_decay:
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)

    def _learning_rate(self) -> float:
        done = self.step / self.schedule.steps
        warm = min(1.0, (self.step + 1) / self.schedule.warmup)
        return (
            self.schedule.learning_rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        if not self.schedule.ema_decay:
            return
        decay = min(self.schedule.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def _save(self) -> None:
        if self.rank != 0:
            return
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.parameters[0].device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step = state["step"]
