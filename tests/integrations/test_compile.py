"""torch.compile of the model, and of a training step around ``opt.step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_weights, backward, fast_config, make_batches, make_model, weights

from triton_hybrid import HybridOptimizer

DRIVES = pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])
STEPS = 24


def run(inline: bool, wrap: Callable[[Any], Any], whole: bool) -> HybridOptimizer:
    """Trains with a compiled model, or with a compiled step of the loop."""
    torch._dynamo.reset()
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config(inline=inline))
    batches, net = make_batches(), model if whole else wrap(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.observe_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return loss

    taken = wrap(step) if whole else step
    for _ in range(STEPS):
        if optimizer.needs_backward:
            taken(*next(batches))
        else:
            optimizer.step()
    return optimizer


@DRIVES
@pytest.mark.parametrize("whole", [False, True], ids=["model", "step"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_same_bits_as_without(backend: str, whole: bool, inline: bool) -> None:
    compiled = run(inline, lambda what: torch.compile(what, backend=backend), whole)
    plain = run(inline, lambda what: what, whole)
    assert_same_weights(weights(compiled), weights(plain))
    assert compiled.stats().steps_per_phase == plain.stats().steps_per_phase
    assert compiled.stats().predicted_steps > 5


def test_compiling_the_step_itself_loses_no_count() -> None:
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model()
        optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        batches = make_batches()
        for _ in range(STEPS):
            backward(model, next(batches))
            step()
            optimizer.zero_grad()
        assert optimizer.stats().gradient_evaluations == STEPS
        runs.append(weights(optimizer))
    assert_same_weights(*runs)
