"""One run of the digits example: a small convolutional network, a seed, an optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from digits_data import CLASSES, Digits, Part
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

# As wide as makes about 50,000 parameters, by the size of an image.
HIDDEN = {8: 86, 28: 28}
WEIGHT_DECAY = 1e-2  # torch's default for AdamW
EVALUATION_BATCH = 2_000
SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    Attributes:
        name: What files call it.
        title: What tables and plots call it.
        colour: Its colour in the plot.
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


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common.

    Attributes:
        budget: Gradient evaluations.
        batch: Images in a batch.
        interval: Gradient evaluations between two measurements of accuracy.
        target: The accuracy to reach.
        schedule: "linear" (to zero at the end of the budget) or "constant".
    """

    budget: int
    batch: int
    interval: int
    target: float
    schedule: str


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
    """What one run did.

    Attributes:
        contender: Name of the optimizer.
        seed: Seed of the initial weights and of the order of the batches.
        learning_rate: The first learning rate.
        budget: Gradient evaluations it was to take.
        curve: Accuracy on the way.
        stats: What HybridOptimizer reports.
    """

    contender: str
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
    """Returns a fresh network of two convolutions, from the global generator.

    Args:
        size: Rows and columns of an image, 8 or 28.
    """
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
    """Returns the images of every batch, of shape (gradients, batch).

    Every image comes once before any comes again. Row k depends on nothing but the seed and the
    two sizes, so that all runs of a seed see the same batch at their k-th gradient.

    Args:
        seed: The seed.
        examples: Images there are.
        batch: Images in a batch.
        gradients: Batches wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-gradients * batch // examples)
    order = [torch.randperm(examples, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[: gradients * batch].reshape(gradients, batch)


def build_optimizer(
    contender: Contender, model: nn.Module, learning_rate: float
) -> torch.optim.Optimizer:
    """Builds the optimizer of a run.

    Args:
        contender: Which one.
        model: What it trains.
        learning_rate: Of all parameters; Muon's updates are scaled to suit the same rate.
    """
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": WEIGHT_DECAY}
    if contender.hybrid is None:
        adamw: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **settings)
        return adamw
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
    report: Callable[[], None] = lambda: None,
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
        seed: Seed of the weights and of the order of the batches.
        learning_rate: The first learning rate.
        report: Called after every measurement.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(digits.size)
    order = batch_order(seed, len(digits.training), recipe.batch, recipe.budget)
    optimizer = build_optimizer(contender, model, learning_rate)
    scheduler = LambdaLR(optimizer, _schedule(recipe))
    hybrid = optimizer if isinstance(optimizer, HybridOptimizer) else None
    run = Run(contender.name, seed, learning_rate, recipe.budget)
    seconds = processor_seconds = 0.0
    for first in range(0, recipe.budget, recipe.interval):
        started, processor_started = time.perf_counter(), time.process_time()
        for chosen in order[first : first + recipe.interval]:
            images, labels = digits.training.images[chosen], digits.training.labels[chosen]
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
        accuracy = measure(model, judged_on)
        run.curve.append(Point(gradients, accuracy, seconds, processor_seconds))
        report()
    if hybrid is not None:
        run.stats = hybrid.stats().to_dict()
    return run


@torch.no_grad()
def measure(model: nn.Module, part: Part) -> float:
    """Returns the share of some images that a model recognises."""
    batches = zip(
        torch.split(part.images, EVALUATION_BATCH),
        torch.split(part.labels, EVALUATION_BATCH),
        strict=True,
    )
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(part)


def _schedule(recipe: Recipe) -> Callable[[int], float]:
    if recipe.schedule == "constant":
        return lambda step: 1.0
    return lambda step: max(0.0, 1 - step / recipe.budget)
