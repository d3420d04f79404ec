"""Several processes that train one model, as torchrun starts them; or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of them this one is.

    Attributes:
        rank: Its number.
        count: How many there are.
        local: Its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def started(cls) -> Processes:
        """Those that torchrun has started; this one alone where it has not."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        numbers = [os.environ.get(name, "") for name in names]
        return cls(*map(int, numbers)) if all(numbers) else cls()

    @property
    def several(self) -> bool:
        """Whether there is more than this one."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this one shows and writes results."""
        return self.rank == 0

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Makes the default process group: NCCL between GPUs, gloo on CPUs."""
        if self.several:
            on_gpu = device.type == "cuda"
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        try:
            yield
        finally:
            if self.several:
                dist.destroy_process_group()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process goes through the block alone, then all others."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def said_by_first(self, text: str) -> str:
        """The first process's text, on all of them."""
        said = [text]
        if self.several:
            dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def wait(self) -> None:
        """Waits for all, over gloo: no GPU is kept busy by it."""
        if self.several:
            dist.all_reduce(torch.zeros(1))

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch that all of them have drawn alike."""
        return batch.chunk(self.count)[self.rank]

    def mean(self, loss: torch.Tensor) -> float:
        """The mean of all processes' losses."""
        if not self.several:
            return float(loss)
        total = loss.detach().double().cpu()
        dist.all_reduce(total)
        return float(total) / self.count


ALONE = Processes()
