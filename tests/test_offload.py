"""Offloaded state: the same bits, in host memory between its uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    state_copy,
    train,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups

PREDICTORS = ("slow_ema", "subspace", "linear", "auto", "none")
KINDS = ("cpu", "pinned")


def run(steps: int, dtype: torch.dtype, kind: str, **options: Any) -> HybridOptimizer:
    model = make_model(dtype)
    config = fast_config(offload=kind, **options)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    batches = make_batches()
    for step in range(steps):
        if optimizer.needs_backward:
            loss = backward(model, next(batches))
            # Now and then a prediction is taken back.
            rejected = step % 13 == 7 and optimizer.phase is Phase.CORRECT
            optimizer.observe_loss(float("inf") if rejected else loss)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_same_bits_with_and_without(predictor: str, inline: bool, dtype: torch.dtype) -> None:
    usual, *others = (
        run(60, dtype, kind, predictor=predictor, inline=inline) for kind in ("none", *KINDS)
    )
    for other in others:
        assert_same_weights(weights(usual), weights(other))
        assert_same_state(state_copy(usual), state_copy(other))
        assert usual.stats().rollbacks == other.stats().rollbacks
    assert (usual.stats().predicted_steps > 0) == (predictor != "none")


def test_same_bits_with_muon() -> None:
    results = []
    for kind in ("none", "cpu"):
        torch.manual_seed(0)
        layers = [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)]
        model = nn.Sequential(*layers)
        config = fast_config(offload=kind, inline=False)
        optimizer = HybridOptimizer(split_param_groups(model), lr=1e-2, hybrid=config)
        train(model, optimizer, 40)
        results.append(optimizer)
    assert_same_weights(*(weights(optimizer) for optimizer in results))


def test_nothing_lies_on_the_device_between_uses() -> None:
    model = make_model()
    optimizer = HybridOptimizer(
        model.parameters(), hybrid=fast_config(offload="cpu", predictor="subspace", inline=False)
    )

    def check(index: int, phase: Phase) -> None:
        memory = optimizer._runtime.memory
        assert memory.offload.resident == (not optimizer.needs_backward)
        if optimizer.needs_backward:
            held = [
                memory.sets[0].tensors.flat[name]
                for name in memory.sets[0].hosted
                if name in memory.sets[0].tensors.flat
            ]
            assert all(not tensor.numel() for row in held for tensor in row)

    phases = train(model, optimizer, 60, after=check)
    assert {Phase.PREDICT, Phase.CORRECT} <= set(phases)
    stats = optimizer.stats()
    numbers = sum(param.numel() for param in model.parameters())
    # Snapshot and four displacements of the trajectory, in FP32.
    assert stats.state_bytes_host == 5 * 4 * numbers


def test_beyond_adamw_a_trajectory_costs_no_device_memory() -> None:
    """Besides moments and the slow EMA that measures noise: a few numbers for each tensor."""
    model = nn.Linear(300, 300)
    config = HybridConfig(predictor="subspace", offload="cpu")
    optimizer = HybridOptimizer(model.parameters(), hybrid=config)
    optimizer.zero_grad()
    model(torch.randn(4, 300)).square().mean().backward()
    optimizer.step()
    numbers = sum(param.numel() for param in model.parameters())
    stats = optimizer.stats()
    assert stats.state_bytes_host == 5 * 4 * numbers
    assert stats.state_bytes_device - 3 * 4 * numbers < 0.1 * numbers


@pytest.mark.parametrize("stop", range(4, 12))
@pytest.mark.parametrize("kinds", [("cpu", "cpu"), ("none", "cpu"), ("cpu", "none")], ids=str)
def test_checkpoint_goes_on_bit_for_bit(stop: int, kinds: tuple[str, str]) -> None:
    """Also in the middle of a stretch, and from one kind of memory to the other."""
    model = make_model()
    config = fast_config(predictor="subspace", inline=False, offload=kinds[0])
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    train(model, optimizer, stop)
    twin = copy.deepcopy(model)
    changed = fast_config(predictor="subspace", inline=False, offload=kinds[1])
    other = HybridOptimizer(twin.parameters(), lr=1e-2, hybrid=changed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for left, right in ((optimizer, model), (other, twin)):
        train(right, left, 25, make_batches(9))
        left.state_dict()  # in the middle of a stretch, brings the state up to date
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))


def test_device_memory_is_what_it_was_after_every_cycle() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    train(model, optimizer, 2)
    before = optimizer.stats()
    train(model, optimizer, 60)
    after = optimizer.stats()
    assert after.state_bytes_device == before.state_bytes_device
    assert after.state_bytes_host == before.state_bytes_host
