"""``orthogonal``: which parameters it moves, by how much, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_weights, fast_config, weights

from triton_hybrid import HybridOptimizer, Phase
from triton_hybrid.predictors.orthogonal import LENGTH, is_hidden

SHAPES = ((12, 8), (8, 12), (60, 11), (66, 11), (3, 4, 5), (1, 7), (9,), ())
"""The third is just short enough to be a matrix between layers."""
MOVED = [True, True, True, False, False, False, False, False]


def trained(
    shapes: Any = SHAPES, steps: int = 40, seed: int = 0, **options: Any
) -> tuple[HybridOptimizer, list[nn.Parameter]]:
    """An optimizer that has followed noisy gradients up to a Predict step, if there is one."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    config = fast_config(predictor="orthogonal", inline=False, **options.pop("config", {}))
    optimizer = HybridOptimizer(params, lr=1e-2, hybrid=config, **options)
    for number in range(2 * steps):
        if number >= steps and (
            optimizer.phase is Phase.PREDICT or not optimizer.stats().predicted_steps
        ):
            break
        optimizer.zero_grad()
        for param in params if optimizer.needs_backward else ():
            noise = 0.3 * torch.randn(param.shape, generator=generator)
            param.grad = param.detach() + noise
            if param.ndim == 2:
                param.grad[0] = 0.0  # as a word that no batch has had
        optimizer.step()
    optimizer.zero_grad()
    return optimizer, params


@pytest.mark.parametrize(("shape", "hidden"), list(zip(SHAPES, MOVED)))
def test_what_is_a_matrix_between_layers(shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden(shape) == hidden


def moved_by(optimizer: HybridOptimizer) -> list[Tensor]:
    before = weights(optimizer)
    assert optimizer.phase is Phase.PREDICT
    optimizer.step()
    return [after - old for after, old in zip(weights(optimizer), before)]


def test_matrices_move_and_nothing_else() -> None:
    optimizer, _ = trained()
    moves = moved_by(optimizer)
    assert [bool((move != 0).any()) for move in moves] == MOVED
    for move, hidden in zip(moves, MOVED):
        assert not hidden or bool((move[0] == 0).all()), "a row without a gradient moved"


@pytest.mark.parametrize("lr", [1e-2, 2e-3])
def test_a_move_has_the_length_of_some_steps_of_muon(lr: float) -> None:
    """The root mean square of its matrices is 0.2 times rate and length, nearly."""
    steps = 1
    while (found := trained(steps=steps))[0].phase is not Phase.PREDICT:
        steps += 1  # to the first prediction, which nothing has made longer or shorter yet
    optimizer, params = found
    optimizer.param_groups[0]["lr"] = lr
    for param, move in zip(params[:3], moved_by(optimizer)):
        size = float(move[1:].square().mean().sqrt()) / (0.2 * lr * LENGTH)
        assert 0.6 < size < 1.3, param.shape


def test_without_matrices_no_gradient_is_left_out() -> None:
    optimizer, _ = trained(shapes=((9,), (3, 4, 5)), steps=60)
    assert optimizer.stats().predicted_steps == 0
    assert optimizer.phase is Phase.FULL
    assert "no matrix" in optimizer.stats().reason
    assert trained()[0].stats().reason == ""


def test_groups_of_muon_are_plain_muon() -> None:
    shapes = ((12, 8), (8, 12))
    ours, _ = trained(shapes, steps=60, base="muon")
    theirs, params = trained(shapes, steps=0, base="muon", config={"warmup_steps": 999})
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        torch.randn(shape, generator=generator)
    for _ in range(60):
        for param in params:
            param.grad = param.detach() + 0.3 * torch.randn(param.shape, generator=generator)
            param.grad[0] = 0.0
        theirs.step()
    assert ours.stats().predicted_steps == 0
    assert_same_weights(weights(ours), weights(theirs))


def test_the_slow_ema_forgets_in_time() -> None:
    """With a gradient that turns round, the row has turned after a few windows of 20."""
    param = nn.Parameter(torch.zeros(6, 6))
    optimizer = HybridOptimizer([param], lr=1e-3, hybrid=fast_config(predictor="orthogonal"))
    for step in range(260):
        param.grad = torch.ones(6, 6) if step < 200 else -torch.ones(6, 6)
        optimizer.step()
    slow = optimizer.state[param]["slow_ema"]
    assert bool((slow < -0.9 * (1.0 - 2.0 * 0.95**60)).all())
