"""One run of the frontier: what decides it, the training loop, and the line that records it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frontier.drivers import SCHEDULES, rate_factor
from frontier.optimizers import find_optimizer, make_optimizer
from frontier.tasks import build_task
from lib.environment import environment, versions
from lib.files import plain
from lib.run_store import run_key

CURVE_POINTS = 12
LAST_LOSSES = 0.1


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run."""

    task: str
    optimizer: str
    lr: float  # at its peak
    budget: int  # gradient evaluations
    seed: int  # of initial weights and data order
    schedule: str = "linear"  # of the learning rate, after a short warm-up: see `rate_factor`
    task_options: dict[str, Any] = field(default_factory=dict)
    optimizer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.lr, float) and math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr!r}: must be a positive finite float")
        if self.budget < 1:
            raise ValueError(f"budget={self.budget!r}: must be an integer >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: must be an integer >= 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: must be one of {SCHEDULES}")

    @property
    def key(self) -> str:
        """A hash of all fields: the run's name in a file of runs."""
        return run_key(dataclasses.asdict(self))

    def check(self) -> None:
        """Raises a ValueError or RuntimeError where the run cannot be started."""
        task = build_task(self.task, self.task_options)
        entry = find_optimizer(self.optimizer)
        if entry.full_batch_only and not task.full_batch:
            raise ValueError(
                f"optimizer {self.optimizer!r}: needs a full-batch task, not {self.task!r}"
            )
        # Any model serves to check the options and the packages; Muon needs a hidden layer.
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        make_optimizer(self.optimizer, model, self.lr, self.optimizer_options, self.budget)


class BudgetSpent(Exception):  # noqa: N818  # the orderly end of a run, not an error
    """Leaves an optimizer that asks for one more gradient."""


class Run:
    """A run under way: counts gradients, takes the time, and draws the curve.

    Args:
        spec: What decides it.
        measured: Whether there is a curve.
    """

    def __init__(self, spec: RunSpec, measured: bool = True) -> None:
        self.spec, self._measured = spec, measured
        self.entry = find_optimizer(spec.optimizer)
        self.task = build_task(spec.task, spec.task_options)
        self.seed = spec.seed + self.entry.seed_shift
        self.budget = round(spec.budget * self.entry.budget_factor)
        self.model = self.task.model(self.seed)
        options = {"weight_decay": self.task.weight_decay} | spec.optimizer_options
        self.driver = make_optimizer(
            spec.optimizer, self.model, spec.lr, options, self.budget, self.seed
        )
        self.gradients = 0
        self.losses: list[Tensor] = []
        self.curve: list[tuple[int, float, float]] = []
        self._seconds = self._started = 0.0
        marks = range(1, CURVE_POINTS)
        every = {max(1, round(self.budget * mark / CURVE_POINTS)) for mark in marks}
        self._stops = every if measured else set()

    def train(self) -> None:
        """Spends the budget."""
        self._started = self._clock()
        if self.entry.closure:
            self._train_with_closure()
        else:
            self._train_step_by_step()
        if self._measured:
            self._add_point()

    def _train_step_by_step(self) -> None:
        for index in range(self.budget):
            self.driver.schedule(rate_factor(self.spec.schedule, index, self.budget))
            loss = self._gradient()
            self.driver.observe_loss(loss)
            self.driver.step()
            if self.gradients in self._stops:
                self._add_point()
                if not all(bool(param.isfinite().all()) for param in self.model.parameters()):
                    return  # nothing can come of such weights

    def _train_with_closure(self) -> None:
        """Each closure call is a gradient evaluation; the best point seen is the result.

        A line search ends where it was stopped, while the best point is that of the last
        accepted step.
        """
        best = math.inf
        weights = deepcopy(self.model.state_dict())

        def closure() -> Tensor:
            nonlocal best, weights
            if self.gradients >= self.budget:
                raise BudgetSpent
            loss = self._gradient()
            if float(loss) < best:
                best = float(loss)
                weights = deepcopy(self.model.state_dict())
            if self.gradients in self._stops:
                tried = deepcopy(self.model.state_dict())
                self.model.load_state_dict(weights)
                self._add_point()
                self.model.load_state_dict(tried)
            return loss

        try:
            while True:
                before = self.gradients
                self.driver.step(closure)
                if self.gradients - before <= 1:
                    break  # it has converged and finds no way on
        except BudgetSpent:
            pass
        self.model.load_state_dict(weights)

    def _gradient(self) -> Tensor:
        batch = self.task.batch(self.seed, self.gradients)
        self.driver.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradients += 1
        self.losses.append(loss.detach())
        return loss.detach()

    def _clock(self) -> float:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _add_point(self) -> None:
        """Measures the held-out loss; that takes no time of training."""
        now = self._clock()
        self._seconds = now - self._started
        self.curve.append((self.gradients, round(self._seconds, 4), self.held_out(quick=True)))
        self._started += self._clock() - now

    def held_out(self, quick: bool = False) -> float:
        """Returns the held-out loss at the present weights; see `Task.held_out`."""
        with self._evaluating():
            return self.task.held_out(self.model, quick)

    def training_loss(self) -> float:
        """Returns that at the present weights in full batch, else the mean of the last tenth."""
        if self.task.full_batch:
            with self._evaluating(), torch.no_grad():
                return float(self.task.loss(self.model, self.task.batch(self.seed, 0)))
        count = max(1, round(LAST_LOSSES * len(self.losses)))
        return float(torch.stack(self.losses[-count:]).double().mean())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self.driver.evaluating():
            self.model.eval()
            yield
            self.model.train()

    def line(self) -> dict[str, Any]:
        """Returns the run's line: what it was, what came out, where it ran."""
        held_out, train = self.held_out(), self.training_loss()
        final = held_out if self.task.metric == "held_out" else train
        hardware = environment(torch.device(self.task.device))["hardware"]
        packages = ["torch", "numpy", "triton_hybrid", self.entry.package]
        line = {
            "key": self.spec.key,
            **dataclasses.asdict(self.spec),
            "gradient_evaluations": self.gradients,
            "metric": self.task.metric,
            "loss_scale": self.task.loss_scale,
            "final": final,
            "held_out_final": held_out,
            "train_final": train,
            "curve": self.curve,
            "seconds": round(self._seconds, 4),
            "diverged": not math.isfinite(final),
            "parameters": sum(param.numel() for param in self.model.parameters()),
            "stats": self.driver.stats(),
            "planted": self.entry.planted,
            "settings": self.driver.settings(),
            "data": self.task.data(),
            "hardware": {
                "processor": hardware["processor"],
                "threads": hardware["threads"],
                "device": hardware.get("gpu", "cpu"),
            },
            "versions": versions(package for package in packages if package is not None),
        }
        return dict(plain(line))
