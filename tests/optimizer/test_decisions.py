"""What a step decides is about that step: later ones do not take it for theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from training import same_bits

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

DRIVES = pytest.mark.parametrize("inline", [True, False])


class Fit:
    """A small regression, all examples at once or ten at a time."""

    def __init__(self, predictor: str, inline: bool, batch: int = 0, **options: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.inputs = torch.randn(32, 4)
        config = HybridConfig(
            predictor=predictor, inline=inline, confidence_threshold=0.0, **options
        )
        self.optimizer = HybridOptimizer(self.model.parameters(), lr=1e-2, hybrid=config)
        self.batch, self.steps = batch, 0

    def step(self, loss: float | None = None, nan: bool = False) -> None:
        """One phase step; with another loss than there was, or a gradient that is not finite."""
        if self.optimizer.needs_backward:
            inputs = self.inputs.roll(self.steps * 10, 0)[: self.batch or None]
            found = (self.model(inputs) - torch.sin(2 * inputs[:, :2])).square().mean()
            found.backward()
            if nan:
                next(self.model.parameters()).grad[1, 2] = math.nan
            self.optimizer.observe_loss(found.detach() if loss is None else loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def to(self, phase: Phase, predictor: str | None = None) -> None:
        """Steps until a phase, perhaps of one predictor, is next."""
        for _ in range(90):
            chosen = self.optimizer.stats().predictor if predictor else predictor
            if self.optimizer.phase is phase and chosen == predictor:
                return
            self.step()
        raise AssertionError(f"no {phase} in 90 steps")

    def bits(self) -> list[Tensor]:
        """Weights and state as they are."""
        entries = self.optimizer.state.values()
        rows = [row for entry in entries for row in entry.values() if isinstance(row, Tensor)]
        return [value.detach().clone() for value in (*self.model.parameters(), *rows)]


def fits_before(phase: Phase, predictor: str, inline: bool) -> Iterator[Fit]:
    """Runs that are predicted, sooner or later; without noise where that is what is predicted."""
    for waits in range(0, 24, 4):
        fit = Fit(predictor, inline, batch=0 if predictor in ("auto", "secant") else 10)
        fit.to(Phase.CORRECT, "secant" if predictor == "auto" else None)
        for _ in range(waits):
            fit.step()
        fit.to(phase)
        yield fit


@torch.no_grad()
def write(params: list[nn.Parameter]) -> list[Tensor]:
    """Writes what no step and no prediction comes near to; returns it."""
    other = [5.0 + torch.randn_like(param) for param in params]
    for param, values in zip(params, other, strict=True):
        param.copy_(values)
    return other


def assert_stands(params: list[nn.Parameter], written: list[Tensor], step: int) -> None:
    for param, values in zip(params, written, strict=True):
        assert (param.detach() - values).abs().max() < 0.5, step


@DRIVES
@pytest.mark.parametrize("predictor", ["auto", "secant", "slow_ema", "linear"])
@pytest.mark.parametrize("later", [0, 1, 3])
def test_a_write_after_a_write_stands(predictor: str, inline: bool, later: int) -> None:
    """The first takes one parameter out of a move; the rest of that move is over, too."""
    for fit in fits_before(Phase.CORRECT, predictor, inline):
        params = list(fit.model.parameters())
        fit.model[0].bias.data.add_(0.01)
        for _ in range(1 + later):
            fit.step()
        written = write(params)
        fit.step()
        assert_stands(params, written, fit.steps)


@pytest.mark.parametrize("predictor", ["auto", "secant", "slow_ema", "linear"])
@pytest.mark.parametrize("one", [True, False])
def test_a_write_before_a_predict_step_stands(predictor: str, one: bool) -> None:
    """A move of pairs begins where the last gradient was taken, and nobody is there any more."""
    for fit in fits_before(Phase.PREDICT, predictor, inline=False):
        params = list(fit.model.parameters())[: 1 if one else None]
        written = write(params)
        for _ in range(3):
            fit.step()
            assert_stands(params, written, fit.steps)
        for _ in range(60):
            fit.step()
        assert fit.optimizer.stats().predicted_steps > 5


@DRIVES
@pytest.mark.parametrize("full_steps", [1, 2, 5])
@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "linear"])
def test_a_skipped_step_is_none_after_a_rollback(
    predictor: str, inline: bool, full_steps: int
) -> None:
    fit = Fit(predictor, inline, batch=10, warmup_steps=2, full_steps=full_steps)
    fit.to(Phase.CORRECT)
    fit.step(loss=math.inf)
    assert fit.optimizer.stats().rollbacks == 1
    for turn in range(4 * full_steps):
        phase, predicted = fit.optimizer.phase, fit.optimizer.stats().predicted_steps
        if phase is not Phase.FULL:
            break
        before = fit.bits()
        fit.step(nan=True)
        assert fit.optimizer.phase is phase
        assert fit.optimizer.stats().predicted_steps == predicted
        assert all(map(same_bits, before, fit.bits())), turn
        fit.step()
    assert fit.optimizer.phase is not Phase.FULL


@DRIVES
@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "linear", "secant"])
def test_a_gradient_that_is_not_finite_ends_no_cycle(predictor: str, inline: bool) -> None:
    """At every step of a cycle; a second in a row may reject what stands."""
    fit = Fit(predictor, inline, batch=10, warmup_steps=2, full_steps=2)
    fit.step()
    for _ in range(40):
        if fit.optimizer.needs_backward:
            phase, rejected = fit.optimizer.phase, fit.optimizer.stats().rollbacks
            before = fit.bits()
            fit.step(nan=True)
            assert fit.optimizer.phase is phase
            assert all(map(same_bits, before, fit.bits()))
            assert fit.optimizer.stats().rollbacks == rejected
        fit.step()
    assert fit.optimizer.stats().predicted_steps > 0


@DRIVES
@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])
def test_prediction_goes_on_after_a_write(predictor: str, inline: bool) -> None:
    ends = []
    for writes in (False, True):
        fit = Fit(predictor, inline, warmup_steps=5)
        fit.to(Phase.CORRECT)
        if writes:
            fit.model[0].weight.data.mul_(0.999)
        for _ in range(150):
            fit.step()
        ends.append(fit.optimizer.stats().predicted_steps)
    assert ends[1] > ends[0] / 2 > 4
