"""What every task of the frontier has in common."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task(abc.ABC):
    """A training problem: model, batches, losses. Its options are its fields.

    Two runs with the same seed start at the same weights, and see the same batch at their k-th
    gradient, however many steps either of them takes without one.
    """

    device: str = "cpu"  # or "cuda"

    name: ClassVar[str]
    metric: ClassVar[str] = "held_out"  # or "train": the loss of record
    full_batch: ClassVar[bool] = False  # whether every gradient is that of the whole training loss
    # "log" where the loss of record falls by orders of magnitude, so that means and interpolation
    # belong to its logarithm.
    loss_scale: ClassVar[str] = "linear"
    weight_decay: ClassVar[float] = 0.01  # decoupled, of every optimizer
    # AdamW's grid; an optimizer with other needs scales it.
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: must be 'cpu' or 'cuda'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': no GPU is there; must be 'cpu'")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "device" and value < 1:
                raise ValueError(f"{field.name}={value!r}: must be an integer >= 1")

    def prepare(self) -> None:  # noqa: B027  # most tasks have nothing to prepare
        """Does once, before many processes run the task, what all of them need."""

    def model(self, seed: int) -> nn.Module:
        """Returns a fresh model, initialised by the seed and nothing else."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.new_model()
        return model.to(self.device)

    @abc.abstractmethod
    def new_model(self) -> nn.Module:
        """Returns a fresh model on the CPU, initialised from the global generator."""

    @abc.abstractmethod
    def batch(self, seed: int, index: int) -> Batch:
        """Returns the batch of the gradient with this index, counted from zero."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean training loss on a batch."""

    @abc.abstractmethod
    def held_out(self, model: nn.Module, quick: bool = False) -> float:
        """Returns the mean held-out loss, always on the same data, or quickly on a part of it."""

    @abc.abstractmethod
    def data(self) -> str:
        """Says in a line what the data is."""


def draw(seed: int, index: int, limit: int, shape: tuple[int, ...]) -> Tensor:
    """Returns random integers below a limit that depend on seed and index alone."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randint(limit, shape, generator=generator)
