"""accelerate and Fabric, the real ones: what their wrappers hide is within reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from lightning.fabric import Fabric
from torch import nn
from training import (
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    train,
    weights,
)

from triton_hybrid import HybridOptimizer, Phase
from triton_hybrid.integrations import wrappers


def make(inline: bool = False) -> tuple[nn.Module, HybridOptimizer]:
    model = make_model()
    config = fast_config(inline=inline)
    return model, HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)


def accelerated() -> tuple[Any, Any, Any]:
    accelerator = Accelerator(cpu=True)
    return *accelerator.prepare(*make()), accelerator.backward


def fabricated() -> tuple[Any, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    return *fabric.setup(*make()), fabric.backward


KINDS = pytest.mark.parametrize("prepare", [accelerated, fabricated])


def loop(model: Any, optimizer: Any, run_backward: Any, steps: int = 30, seed: int = 1) -> int:
    """The stepped loop, as the documentation has it; returns how many batches it took."""
    batches, taken = make_batches(seed), 0
    # docs: begin accelerate and Fabric
    for _ in range(steps):
        if wrappers.needs_backward(optimizer):
            x, y = next(batches)
            loss = nn.functional.cross_entropy(model(x), y)
            run_backward(loss)
            wrappers.observe_loss(optimizer, loss)
            taken += 1
        optimizer.step()
        optimizer.zero_grad()
    # docs: end
    return taken


@KINDS
def test_the_loop_is_the_one_without_a_wrapper(prepare: Any) -> None:
    model, optimizer, run_backward = prepare()
    taken = loop(model, optimizer, run_backward)
    plain_model, plain = make()
    train(plain_model, plain, 30)
    assert_same_weights(weights(plain), [p.detach() for p in model.parameters()])
    stats = wrappers.stats(optimizer)
    assert stats.predicted_steps == plain.stats().predicted_steps > 5
    assert taken == stats.gradient_evaluations < 30
    assert wrappers.phase(optimizer) is plain.phase


@KINDS
def test_verified_weights_through_the_wrapper(prepare: Any) -> None:
    model, optimizer, run_backward = prepare()
    before: list[torch.Tensor] = []
    while wrappers.phase(optimizer) is not Phase.CORRECT:
        before = [p.detach().clone() for p in model.parameters()]
        loop(model, optimizer, run_backward, 1)
    predicted = [p.detach().clone() for p in model.parameters()]
    with wrappers.verified_weights(optimizer):
        assert_same_weights([p.detach() for p in model.parameters()], before)
    optimizer.eval()
    assert_same_weights([p.detach() for p in model.parameters()], before)
    saved = optimizer.state_dict()
    assert any("predicted" in entry for entry in saved["state"].values())
    optimizer.train()
    assert_same_weights([p.detach() for p in model.parameters()], predicted)


@pytest.mark.parametrize("stop", [5, 6, 12])
def test_accelerate_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    runs = []
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(*make())
        batches = make_batches()
        if resumed:
            accelerator.load_state(str(tmp_path))
            for _ in range(wrappers.stats(optimizer).gradient_evaluations):
                next(batches)
        for step in range(stop if resumed else 0, 25):
            if step == stop and not resumed:
                with wrappers.verified_weights(optimizer):
                    accelerator.save_state(str(tmp_path))
            if wrappers.needs_backward(optimizer):
                backward(model, next(batches))
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert_same_weights(*runs)


@pytest.mark.parametrize("growth", [3, 1000])
def test_accelerate_with_a_grad_scaler_steps_through_predict(growth: int) -> None:
    model, optimizer = make()
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=growth)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    batches = make_batches()
    for _ in range(30):
        if wrappers.needs_backward(wrapped):
            x, y = next(batches)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        wrapped.step()
        assert not wrapped.step_was_skipped
        wrapped.zero_grad()
    assert wrappers.stats(wrapped).predicted_steps > 5
    assert scaler.get_scale() == (16.0 if growth == 1000 else 16.0 * 2**10)


def test_clipping_moves_inside() -> None:
    model, optimizer = make()
    for limit, then in ((0.0, None), (0.1, 0.1), (5.0, 5.0), (None, None), (0.5, 0.5)):
        wrappers.clip_inside(optimizer, limit)  # as a trainer does whose limit changes by epoch
        assert optimizer._settings.max_grad_norm == then
    other_model = make_model()
    other = HybridOptimizer(
        other_model.parameters(), lr=1e-2, hybrid=fast_config(inline=False), max_grad_norm=0.5
    )
    for limit in (7.0, None):
        wrappers.clip_inside(other, limit)
        assert other._settings.max_grad_norm == 0.5  # the one that it was made with
    train(model, optimizer, 20)
    train(other_model, other, 20)
    assert_same_weights(weights(optimizer), weights(other))
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        wrappers.clip_inside(make()[1], -1.0)


def test_other_optimizers() -> None:
    adamw = torch.optim.AdamW(make_model().parameters())
    assert wrappers.needs_backward(adamw)
    assert wrappers.find(adamw) is None
    wrappers.observe_loss(adamw, 1.0)
    with pytest.raises(TypeError, match="optimizer=AdamW"):
        wrappers.stats(adamw)
