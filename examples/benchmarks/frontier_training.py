"""One run of the frontier: what decides it, the training loop, and the line that records it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from frontier_drivers import Driver
from frontier_optimizers import SCHEDULES, Entry, find_optimizer, make_optimizer, rate_factor
from frontier_tasks import Task, build_task
from run_files import environment

CURVE_POINTS = 12
LAST_LOSSES = 0.1
KEY_LENGTH = 16


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run.

    Attributes:
        task: Name of the task.
        optimizer: Name of the optimizer.
        lr: Peak learning rate.
        budget: Gradient evaluations.
        seed: Of initial weights and data order.
        schedule: ``"linear"`` or ``"cosine"``, both to zero after a short warm-up, or
            ``"constant"``.
        task_options: Options of the task.
        optimizer_options: Options of the optimizer.
    """

    task: str
    optimizer: str
    lr: float
    budget: int
    seed: int
    schedule: str = "linear"
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

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, as plain Python values."""
        return dataclasses.asdict(self)

    @property
    def key(self) -> str:
        """A hash of all fields: the run's name in a file of runs."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]

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
    """Leaves an optimizer that would ask for one more gradient."""


class Run:
    """A run under way: counts gradients, takes the time, and draws the curve.

    Args:
        spec: What to run.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.entry: Entry = find_optimizer(spec.optimizer)
        self.task: Task = build_task(spec.task, spec.task_options)
        self.seed = spec.seed + self.entry.seed_shift
        self.budget = round(spec.budget * self.entry.budget_factor)
        self.model = self.task.model(self.seed)
        options = {"weight_decay": self.task.weight_decay} | spec.optimizer_options
        self.driver: Driver = make_optimizer(
            spec.optimizer, self.model, spec.lr, options, self.budget, self.seed
        )
        self.gradients = 0
        self.losses: list[Tensor] = []
        self.curve: list[list[float | None]] = []
        self.broken = False
        self._seconds = 0.0
        self._started = 0.0
        self._stops = {
            max(1, round(self.budget * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS)
        }

    def train(self) -> None:
        """Spends the budget."""
        self._resume()
        if self.entry.closure:
            self._train_with_closure()
        else:
            self._train_step_by_step()
        self._pause()
        self.curve.append(self._point(self.gradients))

    def _train_step_by_step(self) -> None:
        for index in range(self.budget):
            self.driver.schedule(rate_factor(self.spec.schedule, index, self.budget))
            loss = self._gradient()
            self.driver.observe_loss(loss)
            self.driver.step()
            if self.gradients in self._stops:
                self._pause()
                self.curve.append(self._point(self.gradients))
                self.broken = not all(bool(p.isfinite().all()) for p in self.model.parameters())
                self._resume()
            if self.broken:
                return  # nothing can come of weights that are not finite

    def _train_with_closure(self) -> None:
        """Each closure call is a gradient evaluation; the best point seen is the result.

        A line search ends where it was stopped, while the best point is that of the last
        accepted step.
        """
        best = math.inf
        weights = [param.detach().clone() for param in self.model.parameters()]

        def closure() -> Tensor:
            nonlocal best
            if self.gradients >= self.budget:
                raise BudgetSpent
            loss = self._gradient()
            if float(loss) < best:
                best = float(loss)
                _copy(weights, self.model.parameters())
            if self.gradients in self._stops:
                self._pause()
                tried = [param.detach().clone() for param in self.model.parameters()]
                _copy(self.model.parameters(), weights)
                self.curve.append(self._point(self.gradients))
                _copy(self.model.parameters(), tried)
                self._resume()
            return loss

        try:
            while True:
                before = self.gradients
                self.driver.step(closure)
                if self.gradients - before <= 1:
                    break  # it has converged and finds no way on
        except BudgetSpent:
            pass
        _copy(self.model.parameters(), weights)

    def _gradient(self) -> Tensor:
        batch = self.task.batch(self.seed, self.gradients)
        self.driver.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradients += 1
        self.losses.append(loss.detach())
        return loss.detach()

    def _point(self, gradients: int) -> list[float | None]:
        return [gradients, round(self._seconds, 4), _finite(self.held_out(quick=True))]

    def held_out(self, quick: bool = False) -> float:
        """Returns the held-out loss at the present weights."""
        with self._evaluating():
            return self.task.held_out(self.model, quick)

    def training_loss(self) -> float:
        """Returns the training loss of record.

        In full batch that at the final weights, otherwise the mean of the last tenth.
        """
        if self.task.full_batch:
            with self._evaluating(), torch.no_grad():
                return float(self.task.loss(self.model, self.task.batch(self.seed, 0)))
        count = max(1, round(LAST_LOSSES * len(self.losses)))
        return float(torch.stack(self.losses[-count:]).double().mean())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.driver.before_evaluation()
        self.model.eval()
        yield
        self.model.train()
        self.driver.after_evaluation()

    def _resume(self) -> None:
        self._wait()
        self._started = time.perf_counter()

    def _pause(self) -> None:
        self._wait()
        self._seconds += time.perf_counter() - self._started

    def _wait(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def line(self) -> dict[str, Any]:
        """Returns the run's line: what it was, what came out, where it ran."""
        held_out, train = self.held_out(), self.training_loss()
        final = _finite(held_out if self.task.metric == "held_out" else train)
        where = environment(torch.device(self.task.device))
        hardware = where["hardware"]
        return {
            "key": self.spec.key,
            **self.spec.to_dict(),
            "gradient_evaluations": self.gradients,
            "metric": self.task.metric,
            "loss_scale": self.task.loss_scale,
            "final": final,
            "held_out_final": _finite(held_out),
            "train_final": _finite(train),
            "curve": self.curve,
            "seconds": round(self._seconds, 4),
            "diverged": final is None,
            "parameters": sum(param.numel() for param in self.model.parameters()),
            "stats": _plain(self.driver.stats()),
            "planted": self.entry.planted,
            "settings": _plain(self.driver.settings()),
            "data": self.task.data(),
            "hardware": {
                "processor": hardware["processor"],
                "threads": hardware["threads"],
                "device": hardware.get("gpu", "cpu"),
            },
            "versions": _versions(self.entry, where["versions"]),
        }


def _versions(entry: Entry, known: Mapping[str, str | None]) -> dict[str, str | None]:
    versions = {name: known[name] for name in ("python", "torch", "numpy", "triton_hybrid")}
    if entry.package is not None:
        versions[entry.package] = metadata.version(entry.package)
    return versions


@torch.no_grad()
def _copy(to: Any, source: Any) -> None:
    for target, tensor in zip(to, source, strict=True):
        target.copy_(tensor)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Turns what JSON has no word for into null, and tuples into lists."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _finite(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
