"""The losses that a loop observes: whose they are, and what one of them may do to the others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_memory import DEVICE
from torch import nn
from torch.nn.functional import cross_entropy
from training import fast_config, make_batches, make_model
from triton_hybrid.kernels.ledger import INDEX

from triton_hybrid import AccumulationConfig, HybridOptimizer, Phase


def loop(optimizer: HybridOptimizer, model: nn.Module, steps: int) -> Any:
    """Yields each loss after its backward pass; the caller observes, steps and zeroes."""
    for _, (x, y) in zip(range(steps), make_batches()):
        loss = cross_entropy(model(x), y)
        loss.backward()
        yield loss.detach()


def observed(optimizer: HybridOptimizer) -> float:
    assert optimizer._engine is not None
    return float(optimizer._engine.scalars.ledger[INDEX["loss"]])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_one_high_loss_hides_no_later_one(factor: float, backend: str) -> None:
    """A single loss of ten times the usual was as good as no loss for hundreds of steps."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(), backend=backend)
    rejected, tried, spiked = 0, 0, False
    for number, loss in enumerate(loop(optimizer, model, 50)):
        told = loss
        if number > 12 and not spiked and optimizer.phase is Phase.FULL:
            told, spiked = factor * loss, True
        elif spiked and number > 30 and optimizer.phase is Phase.CORRECT:
            told, tried = 5.0 * loss, tried + 1
        optimizer.observe_loss(told)
        optimizer.step()
        optimizer.zero_grad()
        rejected = optimizer.stats().divergences["loss"]
    assert spiked
    assert rejected == tried > 0


LEVELS: dict[str, Callable[[int], float]] = {
    "zeros, then zeros and ones": lambda step: float(step > 4 and step % 2),
    "another level": lambda step: 1.0 if step < 50 else 10.0,
    "another level, and noise": lambda step: 1.0 if step < 50 else 10.0 + math.sin(7.0 * step),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", LEVELS)
def test_another_level_of_losses_is_believed(kind: str, backend: str) -> None:
    """With every number limited, it was learnt in dozens of steps, or never where all were 0."""
    param = nn.Parameter(torch.zeros(5, device=DEVICE))
    optimizer = HybridOptimizer([param], hybrid=fast_config(), backend=backend)
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        param.grad = (1.0 + 0.3 * torch.randn(5, generator=generator)).to(DEVICE)
        optimizer.observe_loss(LEVELS[kind](number))
        optimizer.step()
        optimizer.zero_grad()
    stats = optimizer.stats()
    assert stats.predicted_steps > 40
    assert stats.rollbacks <= 4


@pytest.mark.parametrize(
    "who", ["scaler", "scaler, cleared by the model", "loop", "loop, before the gradient"]
)
@pytest.mark.parametrize("inline", [True, False])
def test_the_loss_of_a_step_that_is_left_out_goes_with_its_gradient(who: str, inline: bool) -> None:
    """It was averaged into the next one: an infinite one rolled good predictions back."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(inline=inline))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1.0)
    skipped = 0
    for number, (x, y) in zip(range(60), make_batches()):
        if not optimizer.needs_backward:
            optimizer.step()
            continue
        loss = cross_entropy(model(x), y)
        odd = number % 5 == 4
        if odd:
            loss, skipped = loss * math.inf, skipped + 1
        optimizer.observe_loss(loss.detach())
        if odd and who == "loop, before the gradient":
            optimizer.zero_grad()
            continue
        loss.backward()
        if who.startswith("scaler"):
            scaler.scale(torch.zeros((), device=DEVICE))  # which a loop would call backward() on
            scaler.step(optimizer)
            scaler.update(1.0)
        elif not odd:
            optimizer.step()
        (model if "model" in who else optimizer).zero_grad()
    stats = optimizer.stats()
    assert skipped > 5
    assert stats.predicted_steps > 10
    assert stats.rollbacks == 0


def test_a_loss_that_is_observed_before_old_gradients_are_dropped_stays() -> None:
    """``observe; zero_grad; backward; step``: those gradients were read."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    for _, (x, y) in zip(range(8), make_batches()):
        loss = cross_entropy(model(x), y)
        optimizer.observe_loss(loss.detach())
        optimizer.zero_grad()
        if optimizer._engine is not None:
            assert observed(optimizer) == pytest.approx(float(loss))
        loss.backward()
        optimizer.step()


def test_a_predict_step_forgets_the_loss_of_a_gradient_that_it_does_not_read() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(inline=False))
    seen = 0
    for loss in loop(optimizer, model, 20):
        optimizer.observe_loss(loss)
        seen += optimizer.phase is Phase.PREDICT
        with pytest.warns(UserWarning, match="Predict") if seen == 1 else _quiet():
            optimizer.step()
        seen += seen == 1
        optimizer.zero_grad()
        assert math.isnan(observed(optimizer))
    assert seen > 2


class _quiet:  # noqa: N801  # beside `pytest.warns`
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_losses_of_steps_without_parameters_to_train_are_not_kept() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    model.requires_grad_(False)
    for _ in range(5):
        optimizer.observe_loss(torch.tensor(math.inf, device=DEVICE))
        optimizer.step()
    assert not optimizer._binding.observed._early
    model.requires_grad_(True)
    for loss in loop(optimizer, model, 1):
        optimizer.observe_loss(loss)
        optimizer.step()
    assert optimizer.stats().skipped_nonfinite == 0
    assert observed(optimizer) != math.inf


@pytest.mark.parametrize("bound", ["bound", "checkpoint", "limit", "itself"])
def test_infinite_losses_whose_gradients_are_dropped_weigh_nothing(bound: str) -> None:
    """Neither where a loss waits for an engine, nor in the mean of what comes after them."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    for loss in loop(optimizer, model, 20):
        optimizer.observe_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.phase is Phase.CORRECT:
            break
    if bound == "checkpoint":
        saved, optimizer = optimizer.state_dict(), HybridOptimizer(model.parameters())
        optimizer.load_state_dict(saved)
    elif bound == "itself":
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.observe_loss(math.inf)
        optimizer.load_state_dict(optimizer.state_dict())
    elif bound == "limit":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, device=DEVICE))]})
    for _ in range(3):
        optimizer.observe_loss(math.inf)
        optimizer.zero_grad()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.observe_loss(1.0)
    optimizer.observe_loss(2.0)
    engine = optimizer._binding.bind(optimizer.param_groups, optimizer.state)
    assert engine is not None
    assert observed(optimizer) == 1.5
    optimizer.step()
    assert optimizer.stats().rollbacks == 0


# -------------------------------------------------------------------------------- interrupted steps


class Stop(Exception):  # noqa: N818  # as KeyboardInterrupt
    """What a user does in a notebook."""


@pytest.mark.parametrize("what", ["secant", "accumulation"])
def test_an_interrupted_step_leaves_no_factor_behind(what: str) -> None:
    """A rate of 0 stayed on the device, or a loss scale of the window's length."""
    model, options = make_model(), {}
    if what == "accumulation":
        options["accumulation"] = AccumulationConfig(maximum=4, minimum=4)
    config = fast_config(predictor="secant" if what == "secant" else "slow_ema")
    optimizer = HybridOptimizer(model.parameters(), lr=3e-3, hybrid=config, **options)
    x, y = next(make_batches())

    def step() -> None:
        for _ in range(4 if what == "accumulation" else 1):
            loss = cross_entropy(model(x), y)
            loss.backward()
            assert optimizer.window_complete in (True, False)
        optimizer.observe_loss(loss.detach())
        optimizer.step()

    for _ in range(12):
        step()
        optimizer.zero_grad()
    engine = optimizer._engine
    assert engine is not None
    backend, kernel = engine.backend, engine.backend.step
    engine.backend = _Stopping(backend, kernel)
    with pytest.raises(Stop):
        step()
    engine.backend = backend
    optimizer.zero_grad()
    assert float(engine.scalars.ledger[INDEX["loss_scale"]]) == 1.0
    assert engine.scalars.hyperparameters[0].tolist() == engine.hyperparameters[0]
    step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_an_interrupted_quasi_newton_move_is_taken_back(monkeypatch: Any) -> None:
    """A move that nothing had limited stayed, and was taken for what somebody has written."""
    model = make_model()
    config = fast_config(predictor="secant", inline=False)
    optimizer = HybridOptimizer(model.parameters(), lr=3e-3, hybrid=config)
    x, y = next(make_batches())

    def step() -> None:
        if optimizer.needs_backward:
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.observe_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

    while optimizer.phase is not Phase.PREDICT or optimizer._progress.gradients < 9:
        step()
    before = [param.detach().clone() for param in model.parameters()]

    def stop(*_: Any) -> None:
        assert not all(map(torch.equal, before, model.parameters()))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("triton_hybrid.predictors.secant.limit", stop)
        with pytest.raises(Stop):
            optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    for _ in range(20):
        step()
    assert optimizer.stats().acceptance_rate > 0.5


@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])
def test_an_inline_step_after_an_interrupted_prediction_reads_its_gradient(predictor: str) -> None:
    """It was a Predict step: the closure was not called, or a gradient was thrown away."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(predictor=predictor))
    x, y = next(make_batches())
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    def stop(*_: Any) -> None:
        raise Stop

    while not optimizer.stats().predicted_steps:
        optimizer.step(closure)
    engine = optimizer._engine
    assert engine is not None
    engine.predict = stop  # type: ignore[method-assign]
    interrupted = False
    for _ in range(60):
        with contextlib.suppress(Stop):
            optimizer.step(closure)
            continue
        interrupted = True
        break
    assert interrupted
    del engine.predict
    calls = 0
    assert optimizer.needs_backward
    assert optimizer.step(closure) is not None
    assert calls == 1
    before = optimizer.stats().predicted_steps
    for _ in range(20):
        optimizer.step(closure)
    assert optimizer.stats().predicted_steps > before


class _Stopping:
    """A backend whose base step is interrupted as it returns."""

    def __init__(self, backend: Any, kernel: Callable[..., None]) -> None:
        self._backend, self._kernel = backend, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, *arguments: Any, **options: Any) -> None:
        self._kernel(*arguments, **options)
        raise Stop
