"""A physics-informed network for a boundary value problem with a known solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from frontier.tasks.base import Batch, Task

SECOND_WAVE, SECOND_AMPLITUDE = 4, 0.25
GRID = 257


def solution(x: Tensor) -> Tensor:
    """Returns the exact solution u."""
    return (math.pi * x).sin() + SECOND_AMPLITUDE * (SECOND_WAVE * math.pi * x).sin()


def source(x: Tensor) -> Tensor:
    """Returns f = u'' of the exact solution."""
    first = -(math.pi**2) * (math.pi * x).sin()
    wave = SECOND_WAVE * math.pi
    return first - SECOND_AMPLITUDE * wave**2 * (wave * x).sin()


class Field(nn.Module):
    """u(x) = x (1 - x) N(x): a tanh network that satisfies the boundary conditions exactly.

    Value, first and second derivative in x go through the layers together, which is exact and
    far cheaper than differentiating the network twice.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        sizes = [1] + [width] * layers
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps points (count, 1) to u and u'' there."""
        value, first, second = 2 * x - 1, torch.full_like(x, 2.0), torch.zeros_like(x)
        for layer in self.hidden:
            weight = cast(nn.Linear, layer).weight
            value, first, second = layer(value), first @ weight.T, second @ weight.T
            value = value.tanh()
            slope = 1 - value.square()
            second = slope * (second - 2 * value * first.square())
            first = slope * first
        weight = self.out.weight
        value, first, second = self.out(value), first @ weight.T, second @ weight.T
        edge = x * (1 - x)
        return edge * value, edge * second + 2 * (1 - 2 * x) * first - 2 * value


@dataclass(frozen=True)
class Poisson(Task):
    """u'' = f on [0, 1] with u = 0 at both ends, f from a sum of two sine waves.

    The training loss is the mean squared residual at fixed points, divided by the mean square
    of f; every gradient is that of all points. Held-out is the mean squared error against the
    exact solution on a finer grid. The seed decides the initial weights alone.
    """

    width: int = 32  # of the hidden layers
    layers: int = 3
    points: int = 128

    name: ClassVar[str] = "pde"
    full_batch: ClassVar[bool] = True
    loss_scale: ClassVar[str] = "log"
    weight_decay: ClassVar[float] = 0.0
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)

    def new_model(self) -> nn.Module:
        return Field(self.width, self.layers)

    def batch(self, seed: int, index: int) -> Batch:
        x = (torch.arange(self.points) + 0.5).unsqueeze(1).to(self.device) / self.points
        return x, source(x)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, wanted = batch
        _, second = model(x)
        residual: Tensor = second - wanted
        return residual.square().mean() / wanted.square().mean()

    @torch.no_grad()
    def held_out(self, model: nn.Module, quick: bool = False) -> float:
        x = torch.linspace(0, 1, GRID, device=self.device).unsqueeze(1)
        value, _ = model(x)
        return float((value - solution(x)).square().mean())

    def data(self) -> str:
        return f"one-dimensional Poisson problem, {self.points} points, {GRID} held out"
