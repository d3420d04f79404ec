"""Lion as the base rule."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    clone_run,
    fast_config,
    make_batches,
    make_model,
    same_bits,
    state_copy,
    train,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

BACKENDS = ["torch", "triton"]
LION: dict[str, Any] = {"base": "lion", "lr": 1e-3, "betas": (0.9, 0.99)}
NONE = HybridConfig(predictor="none")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_lion(backend: str, weight_decay: float, maximize: bool) -> None:
    shapes = ((30, 17), (9,), (2, 3, 4, 5), ())
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    runs = []
    for make in (HybridOptimizer, pytorch_optimizer.Lion):
        params = [nn.Parameter(tensor.clone()) for tensor in start]
        options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": weight_decay}
        if make is HybridOptimizer:
            options |= {"base": "lion", "backend": backend, "hybrid": NONE}
        optimizer = make(params, maximize=maximize, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30 if backend == "triton" else 100):
            for param in params:
                param.grad = 0.1 * torch.randn(param.shape, generator=generator)
            optimizer.step()
        runs.append(torch.cat([param.detach().flatten() for param in params]).double())
    assert ((runs[0] - runs[1]).norm() / runs[1].norm()).item() < 1e-6


def test_state_is_one_moment() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=NONE, **LION)
    train(model, optimizer, 2)
    assert all(set(entry) == {"step", "exp_avg"} for entry in optimizer.state.values())


@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inline", [True, False])
def test_trains_in_every_phase_and_goes_on_from_a_checkpoint(
    predictor: str, dtype: torch.dtype, inline: bool
) -> None:
    model = make_model(dtype)
    options = {**LION, "lr": 5e-3, "hybrid": fast_config(predictor=predictor, inline=inline)}
    optimizer = HybridOptimizer(model.parameters(), **options)
    first = float(backward(model, next(make_batches())))
    train(model, optimizer, 33)
    twin, other = clone_run(model, optimizer, **options)
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, 30, make_batches(9))
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))
    stats = optimizer.stats()
    assert stats.predicted_steps > 3
    assert stats.confidence > 0.0
    assert float(backward(model, next(make_batches()))) < 0.8 * first
    for param in model.parameters():
        if dtype is torch.bfloat16:
            assert same_bits(param.detach(), optimizer.state[param]["master"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_follow_the_torch_backend(dtype: torch.dtype) -> None:
    found = []
    for backend in BACKENDS:
        model = make_model(dtype)
        config = fast_config(inline=False)
        optimizer = HybridOptimizer(model.parameters(), backend=backend, hybrid=config, **LION)
        phases = train(model, optimizer, 14)
        assert Phase.CORRECT in phases
        state = optimizer.state.values()
        masters = [e["master"] for e in state] if dtype is torch.bfloat16 else weights(optimizer)
        found.append(torch.cat([master.flatten() for master in masters]))
    # A sign decided by the last bit would differ by twice the rate.
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_a_predicted_step_is_a_sign_along_the_slow_ema() -> None:
    param = nn.Parameter(torch.randn(40))
    config = fast_config(inline=False)
    options = {**LION, "weight_decay": 0.0, "hybrid": config}
    optimizer = HybridOptimizer([param], **options)
    generator = torch.Generator().manual_seed(0)
    while optimizer.phase.needs_gradient:
        param.grad = torch.randn(40, generator=generator)
        optimizer.step()
    before = param.detach().clone()
    optimizer.step()
    moved = param.detach() - before
    slow = optimizer.state[param]["slow_ema"]
    torch.testing.assert_close(moved, moved.abs().max() * -slow.sign())
