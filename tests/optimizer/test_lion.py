"""Lion as the base rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn
from training import fast_config, make_model, train

from triton_hybrid import HybridConfig, HybridOptimizer

LION: dict[str, Any] = {"base": "lion", "lr": 1e-3, "betas": (0.9, 0.99)}
NONE = HybridConfig(predictor="none")


@pytest.mark.parametrize(
    ("backend", "weight_decay", "maximize"),
    [*itertools.product(("torch",), (0.0, 0.3), (False, True)), ("triton", 0.3, True)],
)
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
        for _ in range(12 if backend == "triton" else 100):
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
