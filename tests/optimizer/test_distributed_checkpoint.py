"""Checkpoints through torch.distributed.checkpoint's state dicts, nested and flattened."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import assert_same_state, assert_same_weights, fast_config, state_copy, weights

from triton_hybrid import HybridOptimizer, split_param_groups


def make() -> tuple[nn.Module, HybridOptimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)]
    model = nn.Sequential(*layers)
    groups = split_param_groups(model, lr=1e-2)
    return model, HybridOptimizer(groups, loss_scale="dynamic", hybrid=fast_config(inline=False))


def step(model: nn.Module, optimizer: HybridOptimizer, seed: int) -> None:
    if optimizer.needs_backward:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
        optimizer.scale_loss(model(x).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stop", [3, 6, 7, 8, 9])
def test_goes_on_bit_for_bit(flat: bool, stop: int) -> None:
    model, optimizer = make()
    for index in range(stop):
        step(model, optimizer, index)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    twin, other = make()
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.phase is optimizer.phase
    assert other.param_groups[0]["blocks"] == optimizer.param_groups[0]["blocks"]
    for index in range(stop, stop + 20):
        step(model, optimizer, index)
        step(twin, other, index)
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))
    assert other.stats().predicted_steps == optimizer.stats().predicted_steps > 0
