"""The weight EMA: when it pulls, when it is kept at all, and what else may write it."""

from __future__ import annotations

import pytest
import torch
from training import fast_config, make_model, train
from triton_hybrid.kernels.scalars import HYPER

from triton_hybrid import HybridOptimizer
from triton_hybrid.predictors.slow_ema import EARLY_STEPS, PULL_SHARE_AT_CONSTANT_RATE


def pull_share(optimizer: HybridOptimizer) -> float:
    """The share of the way that the next predicted step would go, as the device has it."""
    assert optimizer._engine is not None
    return float(optimizer._engine.scalars.hyperparameters[0, HYPER["pull_share"]])


@pytest.mark.parametrize("tensor", [False, True])
def test_only_a_constant_learning_rate_pulls(tensor: bool) -> None:
    model = make_model()
    lr = torch.tensor(1e-2) if tensor else 1e-2
    optimizer = HybridOptimizer(model.parameters(), lr=lr, hybrid=fast_config())
    train(model, optimizer, 3)
    assert pull_share(optimizer) == PULL_SHARE_AT_CONSTANT_RATE
    optimizer.param_groups[0]["lr"] = lr * 0.9
    train(model, optimizer, 1)
    assert pull_share(optimizer) == 0.0
    train(model, optimizer, 1)
    assert pull_share(optimizer) == PULL_SHARE_AT_CONSTANT_RATE


def test_weights_written_from_outside_become_the_weight_ema() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 3)
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.fill_(0.25)
    optimizer._binding.bind(optimizer.param_groups, optimizer.state)
    assert torch.equal(optimizer.state[parameter]["weight_ema"], parameter)


def test_a_checkpoint_without_the_weight_ema_starts_it_at_the_weights() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry["weight_ema"]
    restored = HybridOptimizer(model.parameters(), hybrid=fast_config())
    restored.load_state_dict(saved)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    restored._binding.bind(restored.param_groups, restored.state)
    for parameter in model.parameters():
        assert torch.equal(restored.state[parameter]["weight_ema"], parameter)


@pytest.mark.parametrize("predictor", ["linear", "none"])
def test_models_that_do_not_use_the_weight_ema_do_not_keep_it(predictor: str) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(predictor=predictor))
    train(model, optimizer, 3)
    assert not any("weight_ema" in entry for entry in optimizer.state.values())


def test_an_old_run_leaves_the_weight_ema_alone() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 420)
    before = [entry["weight_ema"].clone() for entry in optimizer.state.values()]
    assert optimizer.stats().gradient_evaluations >= EARLY_STEPS
    train(model, optimizer, 8)
    for entry, expected in zip(optimizer.state.values(), before):
        assert torch.equal(entry["weight_ema"], expected)
    assert optimizer._engine is not None
    assert optimizer._engine.read()["slow_count"] > EARLY_STEPS
