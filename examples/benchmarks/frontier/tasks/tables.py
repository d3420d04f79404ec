"""Tasks on the data sets that scikit-learn brings along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontier.tasks.base import Batch, Task, draw
from lib.scikit_data import scikit_datasets

SPLIT_SEED = 99
TRAINING_EXAMPLES = {"digits": 1400, "breast_cancer": 400}


Table = tuple[Batch, Batch, str]
"""What is trained on and what is held out, as inputs and classes, and a description."""


@lru_cache(maxsize=4)
def load_table(name: str, device: str) -> Table:
    """Returns a data set of scikit-learn in a fixed random order, standardised."""
    load: Callable[..., tuple[object, object]] = getattr(scikit_datasets(), f"load_{name}")
    features, classes = load(return_X_y=True)
    inputs = torch.as_tensor(features, dtype=torch.float32)
    targets = torch.as_tensor(classes, dtype=torch.int64)
    count = TRAINING_EXAMPLES[name]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    inputs, targets = inputs[order], targets[order]
    if name == "digits":
        inputs = inputs / 16 - 0.3  # grey values from 0 to 16, with a mean of about 5
    else:
        inputs = (inputs - inputs[:count].mean(0)) / inputs[:count].std(0)
    inputs, targets = inputs.to(device), targets.to(device)
    description = f"scikit-learn {name}: {count} examples, {len(inputs) - count} held out"
    return (inputs[:count], targets[:count]), (inputs[count:], targets[count:]), description


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy on a table; every gradient is that of all its examples."""

    table: ClassVar[str] = "digits"

    def batch(self, seed: int, index: int) -> Batch:
        return load_table(self.table, self.device)[0]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def held_out(self, model: nn.Module, quick: bool = False) -> float:
        # These sets are small enough for all of it every time.
        return float(self.loss(model, load_table(self.table, self.device)[1]))

    def data(self) -> str:
        return load_table(self.table, self.device)[2]


@dataclass(frozen=True)
class MiniBatches(Classification):
    """Cross-entropy on random examples, `batch_size` a step."""

    batch_size: int = 64

    def batch(self, seed: int, index: int) -> Batch:
        inputs, targets = super().batch(seed, index)
        chosen = draw(seed, index, len(inputs), (self.batch_size,)).to(self.device)
        return inputs[chosen], targets[chosen]


@dataclass(frozen=True)
class DigitsConvolution(MiniBatches):
    """Handwritten digits, 8 x 8 pixels, by two convolutions and a hidden layer."""

    name: ClassVar[str] = "digits-cnn"

    def new_model(self) -> nn.Module:
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        convolutions = nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), second, nn.ReLU()
        hidden = nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU()
        return nn.Sequential(*convolutions, *hidden, nn.Linear(64, 10))


@dataclass(frozen=True)
class DigitsFullBatch(Classification):
    """Handwritten digits, every gradient that of all 1,400 examples.

    The loss of record is the training loss: this task is about optimization alone. No weight
    decay, which would put a floor under it. `width` is that of the two hidden layers.
    """

    width: int = 128

    name: ClassVar[str] = "digits-fullbatch"
    metric: ClassVar[str] = "train"
    full_batch: ClassVar[bool] = True
    loss_scale: ClassVar[str] = "log"
    weight_decay: ClassVar[float] = 0.0
    learning_rates: ClassVar[tuple[float, ...]] = (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)

    def new_model(self) -> nn.Module:
        hidden = nn.Linear(64, self.width), nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh()
        return nn.Sequential(*hidden, nn.Linear(self.width, 10))


@dataclass(frozen=True)
class Tabular(MiniBatches):
    """Wisconsin breast cancer diagnoses from 30 measurements, by a small network.

    Small: beyond a few hundred steps at the higher rates the held-out loss rises again.
    """

    table: ClassVar[str] = "breast_cancer"
    name: ClassVar[str] = "tabular"
    learning_rates: ClassVar[tuple[float, ...]] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

    def new_model(self) -> nn.Module:
        hidden = nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(32, 2))
