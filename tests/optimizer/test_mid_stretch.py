"""What users do while a prediction stands: freeze, add, resume, write, and stop by the rate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_memory import DEVICE
from torch import nn
from training import (
    assert_same_weights,
    fast_config,
    feed,
    make_model,
    same_bits,
    small_run,
    to_correct,
    train,
    until,
    weights,
)

from triton_hybrid import HybridOptimizer, Phase

PREDICTORS = pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])


@PREDICTORS
@pytest.mark.parametrize("when", ["before saving", "after loading"])
@pytest.mark.parametrize("change", ["freeze", "add"])
def test_other_parameters_and_a_checkpoint(predictor: str, when: str, change: str) -> None:
    """Whether a parameter is frozen or a group is added, a resumed run does what this one does."""

    def made() -> tuple[nn.Module, HybridOptimizer, nn.Parameter]:
        model = make_model()
        late = nn.Parameter(torch.ones(3, device=DEVICE))
        config = fast_config(predictor=predictor)
        return model, HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config), late

    def changed(model: nn.Module, optimizer: HybridOptimizer, late: nn.Parameter) -> None:
        if change == "freeze":
            model[0].weight.requires_grad_(False)
        else:
            optimizer.add_param_group({"params": [late]})

    (model, optimizer, late), (twin, other, later) = made(), made()
    until(optimizer, model, Phase.CORRECT)
    with optimizer.verified_weights():
        verified = model[0].weight.detach().clone()
    assert not torch.equal(verified, model[0].weight)
    if when == "before saving":
        changed(model, optimizer, late)
        changed(twin, other, later)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if when == "after loading":
        changed(model, optimizer, late)
        changed(twin, other, later)
    for _ in range(12):
        train(model, optimizer, 1)
        train(twin, other, 1)
        assert other.phase is optimizer.phase
        assert_same_weights(weights(optimizer), weights(other))
        if change == "freeze":
            assert same_bits(twin[0].weight.detach(), verified)


@PREDICTORS
@pytest.mark.parametrize("change", ["freeze", "thaw"])
def test_after_loading_other_layers_are_trained(predictor: str, change: str) -> None:
    """Layers that took no part in the prediction: which did, a checkpoint must say."""

    def made() -> tuple[nn.Module, HybridOptimizer]:
        model = make_model()
        groups = [{"params": [*model[2].parameters()]}, {"params": [*model[0].parameters()]}]
        groups[1]["lr"] = 0.0 if change == "freeze" else 1e-2
        return model, HybridOptimizer(groups, lr=1e-2, hybrid=fast_config(predictor=predictor))

    (model, optimizer), (twin, other) = made(), made()
    if change == "thaw":
        train(model, optimizer, 3)
        model[0].requires_grad_(False)
        twin[0].requires_grad_(False)
    until(optimizer, model, Phase.CORRECT)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for its in (model, twin):
        its[0].weight.requires_grad_(change == "thaw")
    for _ in range(10):
        train(model, optimizer, 1)
        train(twin, other, 1)
        assert other.phase is optimizer.phase
        assert_same_weights(weights(optimizer), weights(other))


@PREDICTORS
@pytest.mark.parametrize("inline", [True, False])
def test_frozen_only_while_it_is_saved(predictor: str, inline: bool) -> None:
    """As a GAN's discriminator is in the generator's step: no step ever sees it."""
    config = fast_config(predictor=predictor, inline=inline)
    model, twin = make_model(), make_model()
    optimizer, other = (
        HybridOptimizer(its.parameters(), lr=1e-2, hybrid=config) for its in (model, twin)
    )
    until(optimizer, model, Phase.CORRECT)
    model.requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.requires_grad_(True)
    for _ in range(8):
        train(model, optimizer, 1)
        train(twin, other, 1)
        assert other.phase is optimizer.phase
        assert_same_weights(weights(optimizer), weights(other))


@pytest.mark.parametrize("precision", ["bf16", "split", "fp32"])
def test_what_was_written_before_a_prediction_is_verified(precision: str) -> None:
    params, optimizer = small_run(precision, inline=False)
    feed(optimizer, 8)
    while optimizer.phase is not Phase.PREDICT:
        feed(optimizer)
    with torch.no_grad():
        params[0][1, 1] = 30.0
    feed(optimizer)
    predicted = [param.detach().clone() for param in params]
    with optimizer.verified_weights():
        assert float(params[0][1, 1]) == 30.0
        assert not same_bits(params[1].detach(), predicted[1])
    for param, known in zip(params, predicted):
        assert same_bits(param.detach(), known)


@pytest.mark.parametrize("base", ["adamw", "lion"])
@pytest.mark.parametrize("predictor", ["slow_ema", "linear"])
def test_at_rate_0_nothing_moves_on(predictor: str, base: str) -> None:
    """A rate that ends at 0 while a prediction stands: what is accepted stays where it stands."""
    config: Any = fast_config(predictor=predictor, full_steps=2)
    params, optimizer = small_run(base=base, hybrid=config, weight_decay=0.0)
    to_correct(optimizer)
    with optimizer.verified_weights():
        verified = weights(optimizer)
    predicted = weights(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    # The slope turns round: the secant of both would lead elsewhere.
    for param in params:
        param.grad = 0.5 + torch.zeros_like(param)
    optimizer.step()
    accepted = optimizer.stats().rollbacks == 0
    assert_same_weights(weights(optimizer), predicted if accepted else verified)


@pytest.mark.parametrize("predictor", ["slow_ema", "linear"])
def test_at_rate_0_between_two_predictions_a_group_stays(predictor: str) -> None:
    """Its slope is that of a move which ends there; a trajectory's is found once for a stretch."""
    config: Any = fast_config(
        predictor=predictor, full_steps=3, max_predict_steps=4, correction_interval=3, inline=False
    )
    params = [
        nn.Parameter(torch.arange(20.0, dtype=torch.float64, device=DEVICE) / 20 - k)
        for k in range(2)
    ]
    optimizer = HybridOptimizer([{"params": [p]} for p in params], lr=1e-2, hybrid=config)

    def feed() -> None:
        if optimizer.needs_backward:
            sum(((p - 1) ** 2).sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad()

    while not optimizer.stats().steps_per_phase["predict"]:
        feed()
    assert optimizer.phase is Phase.PREDICT
    optimizer.param_groups[1]["lr"] = 0.0
    moved, stays = (param.detach().clone() for param in params)
    while optimizer.phase is not Phase.FULL:
        feed()
    assert optimizer.stats().rollbacks == 0
    assert same_bits(params[1].detach(), stays)
    assert not same_bits(params[0].detach(), moved)
