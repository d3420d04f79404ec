"""One run of the digits example: a small convolutional network, a seed, an optimizer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from lib.digits_data import CLASSES, Digits, Part
from lib.flags import real_number, whole_number
from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

# As wide as makes about 50,000 parameters, by the size of an image.
HIDDEN = {8: 86, 28: 28}
WEIGHT_DECAY = 1e-2  # torch's default for AdamW
EVALUATION_BATCH = 2_000


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    Attributes:
        name: What files call it.
        title: What tables and plots call it.
        colour: In the plot.
        hybrid: Configuration of HybridOptimizer; None for torch's AdamW.
        muon: Whether Muon is the base rule of hidden matrices.
    """

    name: str
    title: str
    colour: str
    hybrid: HybridConfig | None = None
    muon: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns what it is, for JSON."""
        rule = "HybridOptimizer" if self.hybrid else "torch.optim.AdamW"
        config = self.hybrid.to_dict() if self.hybrid else None
        return {"title": self.title, "optimizer": rule, "muon": self.muon, "hybrid": config}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs have in common, as flags; the defaults are those for scikit-learn's digits.

    Attributes:
        budget: Gradient evaluations of a run.
        batch: Images in a batch.
        interval: Gradient evaluations between two measurements of accuracy.
        target: Test accuracy to reach.
        schedule: Learning rate of every optimizer: to zero at the end of its budget, or constant.
    """

    budget: Annotated[int, whole_number(1)] = 200
    batch: Annotated[int, whole_number(1)] = 32
    interval: Annotated[int, whole_number(1)] = 2
    target: Annotated[float, real_number(0, 1, above=True)] = 0.97
    schedule: Literal["linear", "constant"] = "linear"


@dataclass(frozen=True)
class Point:
    """A measurement of accuracy.

    Attributes:
        gradients: Gradient evaluations so far.
        accuracy: Share of the images that are recognised.
        seconds: Wall-clock time of training so far, measurements left out.
        processor_seconds: The process's CPU time likewise, which other programs do not lengthen.
    """

    gradients: int
    accuracy: float
    seconds: float
    processor_seconds: float


@dataclass
class Run:
    """What one run did: accuracy on the way, and what HybridOptimizer reports."""

    seed: int
    learning_rate: float
    budget: int
    curve: list[Point] = field(default_factory=list)
    stats: dict[str, Any] | None = None

    def reached(self, target: float) -> Point | None:
        """Returns the first measurement at or above an accuracy; None if there is none."""
        return next((point for point in self.curve if point.accuracy >= target), None)

    @property
    def final_accuracy(self) -> float:
        """Accuracy after the last gradient."""
        return self.curve[-1].accuracy

    @property
    def predicted_steps(self) -> int | None:
        """Predicted steps; None where the optimizer cannot predict."""
        return None if self.stats is None else int(self.stats["predicted_steps"])


def build_model(size: int) -> nn.Sequential:
    """Returns a fresh network of two convolutions for images of 8 x 8 or 28 x 28 pixels."""
    # Large images shrink once more between the convolutions.
    between = [nn.MaxPool2d(2)] if size > 8 else []
    side = size // (4 if between else 2)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        *between,
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * side * side, HIDDEN[size]),
        nn.ReLU(),
        nn.Linear(HIDDEN[size], CLASSES),
    )


def parameter_count(size: int) -> int:
    """Counts the parameters of the network for images of a size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(size).parameters())


def batch_order(seed: int, examples: int, batch: int, gradients: int) -> Tensor:
    """Returns which of the examples each batch has, of shape (gradients, batch).

    Every one comes once before any comes again. Row k depends on nothing but the seed and the two
    sizes, so that all runs of a seed see the same batch at their k-th gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-gradients * batch // examples)
    order = [torch.randperm(examples, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[: gradients * batch].reshape(gradients, batch)


def build_optimizer(
    contender: Contender, model: nn.Module, learning_rate: float
) -> torch.optim.Optimizer:
    """Builds an optimizer; Muon's updates are scaled to suit the rate of the other parameters."""
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": WEIGHT_DECAY}
    if contender.hybrid is None:
        return torch.optim.AdamW(model.parameters(), **settings)
    groups: Any = split_param_groups(model) if contender.muon else model.parameters()
    return HybridOptimizer(groups, hybrid=contender.hybrid, **settings)


def train(
    contender: Contender,
    recipe: Recipe,
    digits: Digits,
    judged_on: Part,
    *,
    seed: int,
    learning_rate: float,
) -> Run:
    """Trains once.

    Accuracy is measured on the weights as the next gradient would find them, so in the middle of
    a prediction on the predicted ones. Only training is timed, from the batch to the zeroed
    gradients.

    Args:
        contender: The optimizer.
        recipe: How long, on what, how measured.
        digits: The data.
        judged_on: The part of it that accuracy is measured on.
        seed: Of the weights and of the order of the batches.
        learning_rate: The first one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(digits.size)
    order = batch_order(seed, len(digits.training), recipe.batch, recipe.budget)
    optimizer = build_optimizer(contender, model, learning_rate)
    linear = recipe.schedule == "linear"
    scheduler = LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / recipe.budget) if linear else 1.0
    )
    hybrid = optimizer if isinstance(optimizer, HybridOptimizer) else None
    run = Run(seed, learning_rate, recipe.budget)
    seconds = processor_seconds = 0.0
    for first in range(0, recipe.budget, recipe.interval):
        started, processor_started = time.perf_counter(), time.process_time()
        for chosen in order[first : first + recipe.interval]:
            images, labels = digits.training[chosen]
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            if hybrid is not None:
                hybrid.observe_loss(loss.detach())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - started
        processor_seconds += time.process_time() - processor_started
        gradients = min(first + recipe.interval, recipe.budget)
        run.curve.append(Point(gradients, measure(model, judged_on), seconds, processor_seconds))
    if hybrid is not None:
        run.stats = hybrid.stats().to_dict()
    return run


@torch.no_grad()
def measure(model: nn.Module, part: Part) -> float:
    """Returns the share of some images that a model recognises."""
    starts = range(0, len(part), EVALUATION_BATCH)
    batches = [part[start : start + EVALUATION_BATCH] for start in starts]
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(part)
