"""Two alike, one of which steps eagerly and the other from graphs, with a stand-in for graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_memory import assert_same_bits
from torch import Tensor, nn
from training import run_of

from triton_hybrid import HybridOptimizer, Phase
from triton_hybrid.graphs import GraphedSteps


class Twins:
    """Two alike, one of which steps eagerly and the other from graphs, on gradients of their own.

    Each gradient is of its own weights, so that whatever differs once differs for good.
    """

    def __init__(self, kind: str = "fp32", **options: Any) -> None:
        pairs = [run_of(kind, capturable=True, **options) for _ in range(2)]
        self.models, self.optimizers = zip(*pairs)
        self.eager, self.optimizer = self.optimizers
        self.graphs = GraphedSteps(self.optimizer)
        # Schedulers put a function of their own before the step.
        self.steps = [lambda *told: self.eager.step(*told), self.graphs.step]
        self.generator = torch.Generator().manual_seed(5)
        self.number = 0
        self.without: set[int] = set()
        """Parameters that get no gradient."""

    def give(self, noise: float = 0.3, bad: bool = False) -> list[Tensor]:
        """Gradients of a bowl with noise into both models' gradients, in place; their losses."""
        params = [[*model.parameters()] for model in self.models]
        losses = [torch.zeros(()) for _ in self.models]
        for index, pair in enumerate(zip(*params)):
            if index in self.without:
                continue
            drawn = noise * torch.randn(pair[0].shape, generator=self.generator)
            for place, param in enumerate(pair):
                weight = param.detach().float()
                gradient = (weight + drawn).to(param.dtype)
                if bad:
                    gradient.view(-1)[0] = math.nan
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                param.grad.add_(gradient)
                losses[place] += (weight + drawn).square().sum() / 2
        return losses

    def step(self, **given: Any) -> None:
        """One step of each; both must be the same afterwards, on the host too."""
        if self.eager.needs_backward:
            observe = given.pop("observe", True)
            for optimizer, loss in zip(self.optimizers, self.give(**given)):
                if observe:
                    optimizer.observe_loss(loss)
        self.take()

    def take(self) -> None:
        """One step of each with the gradients that are there."""
        for step, optimizer in zip(self.steps, self.optimizers):
            step()
            optimizer.zero_grad(set_to_none=False)
        self.number += 1
        self.check()

    def check(self) -> None:
        bits = [everything(*pair) for pair in zip(self.models, self.optimizers)]
        same(bits[1], bits[0], f"in step {self.number}")
        for optimizer in self.optimizers:  # zero_grad must free what a loop lets go of
            for its in optimizer._engine._sets:
                assert not any(grad.numel() for grad in its.flat.get("grad", ()))
        hosts = [on_host(optimizer) for optimizer in self.optimizers]
        assert hosts[1] == hosts[0], self.number

    def run(self, steps: int, **given: Any) -> None:
        for _ in range(steps):
            self.step(**given)


def everything(model: nn.Module, optimizer: HybridOptimizer) -> dict[str, Tensor]:
    """Weights, state and ledger."""
    found = {f"weight {name}": param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        entry = optimizer.state[param]
        found |= {f"{key} {name}": value for key, value in entry.items()}
    if optimizer._engine is not None:
        found["ledger"] = optimizer._engine.scalars.ledger
        found["rates"] = optimizer._engine.scalars.hyperparameters
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, f"{name} {what}")


def on_host(optimizer: HybridOptimizer) -> dict[str, Any]:
    """All that the host knows of the phases, but for seconds."""
    engine, progress = optimizer._engine, optimizer._progress
    plain = {
        f"{type(its).__name__}.{name}": value
        for its in (progress.controller, engine, engine.choice, engine.predictor)
        for name, value in vars(its).items()
        if isinstance(value, (bool, int, float, str, Phase))
    }
    windows = optimizer._binding.windows
    report = {} if windows is None else windows.report()
    stats = optimizer.stats().to_dict()
    del stats["seconds_per_phase"]
    return {**plain, **report, **{k: repr(v) for k, v in stats.items()}}


def captured(twins: Twins, kind: Phase = Phase.CORRECT) -> None:
    """Runs until every kind of step is replayed, and one of a phase comes next."""
    twins.run(30)
    while twins.optimizer.phase is not kind:
        twins.step()
