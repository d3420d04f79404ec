"""Adaptive accumulation with overflows, predictions, losses, schedules and checkpoints."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accumulation import FIXED, make, scaled_backward, train, with_a_window
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    state_copy,
    weights,
)
from triton_hybrid.kernels.ledger import INDEX

from triton_hybrid import AccumulationConfig, HybridOptimizer, Phase


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_in_mid_window_skips_its_step(dtype: torch.dtype, backend: str) -> None:
    model, optimizer = make(
        AccumulationConfig(3), dtype, loss_scale="dynamic", backend=backend, max_grad_norm=1.0
    )
    batches = make_batches()
    train(model, optimizer, 3, batches)
    scale = float(optimizer.scale_loss(torch.ones(())))
    before, kept = weights(optimizer), state_copy(optimizer)
    while True:
        x, y = next(batches)
        scaled_backward(model, optimizer, (x, y))
        next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
        if optimizer.window_complete:
            break
    optimizer.step()
    optimizer.zero_grad()
    assert_same_weights(weights(optimizer), before)
    assert_same_state(state_copy(optimizer), kept)
    assert float(optimizer.scale_loss(torch.ones(()))) == scale / 2
    assert optimizer.stats().skipped_nonfinite == 1
    train(model, optimizer, 6, batches)
    noise = optimizer.stats().noise_scale
    assert noise is None or noise >= 0
    for param in model.parameters():
        assert torch.equal(param, optimizer.state[param]["master"].to(dtype))


@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])
def test_a_predict_stretch_splits_no_window(predictor: str) -> None:
    config = fast_config(inline=False, predictor=predictor)
    model, optimizer = make(AccumulationConfig(2, minimum=2), hybrid=config)
    batches, kinds, partial = make_batches(), [], 0
    for _ in range(120):
        if optimizer.needs_backward:
            backward(model, next(batches))
            partial += 1
        else:
            assert partial == 0
        if optimizer.window_complete:
            kinds.append(optimizer.phase)
            optimizer.step()
            optimizer.zero_grad()
            partial = 0
    stats = optimizer.stats()
    assert kinds.count(Phase.PREDICT) == stats.predicted_steps > 5
    assert stats.micro_batches == 2 * stats.windows == 2 * stats.gradient_evaluations


def test_predictions_go_as_far_as_the_window_s_own_steps() -> None:
    """The rate of a shorter window is that of the predictions that follow it."""
    model, optimizer = make(AccumulationConfig(4), hybrid=fast_config(inline=False))
    train(model, optimizer, 60)
    engine, rate = optimizer._engine, optimizer._binding.windows.rate  # type: ignore[union-attr]
    assert engine is not None
    assert 0 < rate < 1
    table = engine.scalars.hyperparameters
    assert float(table[0, 0]) == pytest.approx(1e-2 * rate)
    assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("capturable", [False, True])
def test_losses_are_averaged_over_the_window(capturable: bool) -> None:
    model, optimizer = make(AccumulationConfig(2, minimum=2), capturable=capturable)
    backward(model, next(make_batches()))
    assert not optimizer.window_complete
    optimizer.observe_loss(2.0)
    backward(model, next(make_batches()))
    assert optimizer.window_complete
    optimizer.observe_loss(torch.tensor(4.0))
    optimizer.step()
    ledger = optimizer._engine.scalars.ledger  # type: ignore[union-attr]
    assert float(ledger[INDEX["loss_scale"]]) == 1.0, "the division is undone"


def test_a_replayed_step_finds_the_window_s_numbers_on_the_device() -> None:
    model, optimizer = make(FIXED, capturable=True)
    batches = make_batches()
    train(model, optimizer, 3, batches)
    windows = optimizer._binding.windows
    assert windows is not None
    kept = windows.numbers(next(model.parameters()).device)
    for count in (1, 2, 3):
        backward(model, next(batches))
        _ = optimizer.window_complete
        assert kept.tolist() == pytest.approx([count, math.sqrt(count / 3)])


def test_schedules_move_the_rate_of_every_window() -> None:
    for tensor in (False, True):
        lr: Any = torch.tensor(1e-2) if tensor else 1e-2
        model, optimizer = make(AccumulationConfig(2), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        batches = make_batches()
        for step in range(5):
            while True:
                backward(model, next(batches))
                if optimizer.window_complete:
                    break
            optimizer.step()
            optimizer.zero_grad()
            engine, windows = optimizer._engine, optimizer._binding.windows
            assert engine is not None
            assert windows is not None
            used = float(engine.scalars.hyperparameters[0, 0])
            assert used == pytest.approx(1e-2 * 0.5**step * windows.rate, rel=1e-6)
            schedule.step()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("drive", ["inline", "stepped"])
@settings(max_examples=6)
@given(stop=st.integers(1, 40), later=st.integers(20, 30))
def test_a_checkpoint_in_mid_window_goes_on(
    drive: str, gradients: bool, stop: int, later: int
) -> None:
    def fresh() -> tuple[nn.Module, HybridOptimizer]:
        config = fast_config(inline=drive == "inline")
        return make(AccumulationConfig(4), hybrid=config, loss_scale="dynamic")

    model, optimizer = fresh()
    batches = make_batches()
    train(model, optimizer, stop, batches)
    if not gradients:
        optimizer.zero_grad()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied, other = fresh()
    copied.load_state_dict(model.state_dict())
    for mine, theirs in zip(copied.parameters(), model.parameters()):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    other.load_state_dict(torch.load(file, weights_only=True))
    rest = [next(batches) for _ in range(later)]
    assert train(model, optimizer, later, iter(rest)) == train(copied, other, later, iter(rest))
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))
    mine, theirs = optimizer.stats().to_dict(), other.stats().to_dict()
    for name in ("windows", "micro_batches", "noise_scale"):
        assert str(mine[name]) == str(theirs[name])


def test_a_checkpoint_in_mid_window_has_the_losses_so_far() -> None:
    """They are of gradients: without those, of nothing."""

    def mean_with(optimizer: HybridOptimizer, loss: float) -> float:
        engine = optimizer._binding.bind(optimizer.param_groups, optimizer.state)
        assert engine is not None
        optimizer.observe_loss(loss)
        return float(engine.scalars.ledger[INDEX["loss"]])

    model, optimizer = make(AccumulationConfig(4, minimum=4))
    train(model, optimizer, 6, make_batches())
    saved, copied = copy.deepcopy((optimizer.state_dict(), model))
    for mine, theirs in zip(copied.parameters(), model.parameters()):
        mine.grad = copy.deepcopy(theirs.grad)
    resumed = HybridOptimizer(copied.parameters(), accumulation=AccumulationConfig(4, minimum=4))
    resumed.load_state_dict(saved)
    means = [mean_with(each, 6.0) for each in (optimizer, resumed)]
    assert means[0] == means[1]
    assert 2.0 < means[0] < 6.0
    copied.zero_grad()
    resumed.load_state_dict(saved)
    assert mean_with(resumed, 6.0) == 6.0


def test_a_gradient_that_was_not_counted_when_it_was_saved_counts_later() -> None:
    model, optimizer = make(AccumulationConfig(3, minimum=3))
    batches = make_batches()
    backward(model, next(batches))
    assert not optimizer.window_complete
    backward(model, next(batches))
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.window_complete
    backward(model, next(batches))
    assert optimizer.window_complete


def test_a_copy_goes_on_too() -> None:
    model, optimizer = make(AccumulationConfig(4))
    train(model, optimizer, 9)
    model, other = copy.deepcopy((model, optimizer))
    assert train(model, other, 4)
    assert other.stats().micro_batches > optimizer.stats().micro_batches


def test_after_a_step_that_was_left_out_the_coming_micro_batch_may_be_the_last() -> None:
    """Windows of one: it was said not to be, and ran inside ``no_sync()``."""
    model, optimizer = make(AccumulationConfig(1))
    backward(model, next(make_batches()))
    assert optimizer.window_complete
    assert not optimizer._step_supports_amp_scaling
    model.zero_grad()
    assert optimizer.last_of_window


def test_whoever_asks_as_a_scaler_does_and_clips_ends_no_window() -> None:
    """Fabric and Lightning do, before they unscale."""
    model, optimizer, _ = with_a_window()
    optimizer.observe_loss(1.0)
    assert not optimizer._step_supports_amp_scaling
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert optimizer.window_complete
    optimizer.observe_loss(3.0)
    engine = optimizer._binding.bind(optimizer.param_groups, optimizer.state)
    assert engine is not None
    assert engine.read()["loss"] == 2.0
    optimizer.step()
    assert optimizer.stats().micro_batches == 3
