"""Matrices along their orthogonalised momentum: which, by how much, and what stays where it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import fast_config, weights

from triton_hybrid import HybridOptimizer, Phase
from triton_hybrid.predictors import slow_ema
from triton_hybrid.predictors.orthogonal import LENGTH, is_hidden

SHAPES = (
    (12, 8), (8, 12), (60, 11), (66, 11), (10, 6, 3, 3), (12, 2, 5), (11, 1, 3, 3), (1, 7), (9,), ()
)  # fmt: skip
"""The third is just short enough to be a matrix between layers; then three filters."""
MOVED = [True, True, True, False, True, False, False, False, False, False]


def trained(
    shapes: Any = SHAPES, steps: int = 40, seed: int = 0, **options: Any
) -> tuple[HybridOptimizer, list[nn.Parameter]]:
    """An optimizer that has followed noisy gradients up to a Predict step, if there is one."""
    generator, dtype = torch.Generator().manual_seed(seed), options.pop("dtype", torch.float32)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    order = options.pop("memory_format", torch.contiguous_format)
    params = [nn.Parameter(value.contiguous(memory_format=order)) for value in made]
    config = fast_config(**{"inline": False, **options.pop("config", {})})
    optimizer = HybridOptimizer(params, lr=1e-2, hybrid=config, **options)
    for number in range(2 * steps):
        if number >= steps and (
            optimizer.phase is Phase.PREDICT or not optimizer.stats().predicted_steps
        ):
            break
        optimizer.zero_grad()
        for param in params if optimizer.needs_backward else ():
            noise = 0.3 * torch.randn(param.shape, generator=generator)
            param.grad = (param.detach() + noise).to(dtype)
            if param.ndim > 1:
                param.grad[0] = 0.0  # as a word that no batch has had
        optimizer.step()
    optimizer.zero_grad()
    return optimizer, params


@pytest.mark.parametrize(("shape", "hidden"), list(zip(SHAPES, MOVED)))
def test_what_is_a_matrix_between_layers(shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden(shape) == hidden


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0, 2), (4, 4, 0)])
def test_without_elements_nothing_is_a_matrix(shape: tuple[int, ...]) -> None:
    assert not is_hidden(shape)


def moved_by(optimizer: HybridOptimizer) -> list[Tensor]:
    before = weights(optimizer)
    assert optimizer.phase is Phase.PREDICT
    optimizer.step()
    return [after - old for after, old in zip(weights(optimizer), before)]


def first_moves(lr: float = 1e-2) -> tuple[HybridOptimizer, list[Tensor]]:
    """What the first prediction of a run moves, when nothing has made it longer or shorter yet."""
    steps = 1
    while True:
        optimizer, _ = trained(steps=steps)
        if optimizer.phase is Phase.PREDICT:
            break
        steps += 1
    optimizer.param_groups[0]["lr"] = lr
    return optimizer, moved_by(optimizer)


@pytest.fixture
def no_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all parameters were vectors."""
    monkeypatch.setattr(slow_ema, "is_turned", lambda rule, member: False)


def test_matrices_move_along_their_momentum_and_the_rest_along_the_slow_ema(
    request: pytest.FixtureRequest,
) -> None:
    optimizer, ours = first_moves()
    request.getfixturevalue("no_matrices")
    _, theirs = first_moves()
    for move, other, hidden in zip(ours, theirs, MOVED):
        assert bool((move != 0).any()) or move.shape == (1, 7), "whose gradients are zero"
        assert torch.equal(move, other) != hidden
        assert not hidden or bool((move[0] == 0).all()), "a row without a gradient moved"
    for param, hidden in zip(optimizer.param_groups[0]["params"], MOVED):
        rows = {"direction"} if hidden else {"slow_ema"}
        assert {"direction", "slow_ema"} & set(optimizer.state[param]) == rows


def test_matrices_that_a_cpu_cannot_afford_follow_the_slow_ema() -> None:
    optimizer, params = trained(shapes=((257, 300), (256, 300)), steps=3)
    rows = [{"direction", "slow_ema"} & set(optimizer.state[param]) for param in params]
    assert rows == [{"slow_ema"}, {"direction"}]


def test_a_filter_moves_as_the_matrix_of_its_outputs_in_any_order_of_memory() -> None:
    flat, first = (10, 54), (10, 6, 3, 3)
    moves = []
    for shape, order in (
        (flat, torch.contiguous_format),
        (first, torch.contiguous_format),
        (first, torch.channels_last),
    ):
        optimizer, (param,) = trained(shapes=(shape,), memory_format=order)
        assert "direction" in optimizer.state[param]
        assert param.is_contiguous(memory_format=order)
        moves.append(moved_by(optimizer)[0].reshape(flat))
    assert torch.equal(moves[0], moves[1])
    # Sums are in another order.
    torch.testing.assert_close(moves[0], moves[2], rtol=1e-3, atol=1e-6)


def test_a_filter_whose_outputs_are_not_outermost_in_memory_follows_the_slow_ema() -> None:
    turned = nn.Parameter(torch.randn(8, 6, 3).transpose(0, 1))
    optimizer = HybridOptimizer([turned], lr=1e-2, hybrid=fast_config())
    turned.grad = torch.randn(6, 8, 3)
    optimizer.step()
    assert {"direction", "slow_ema"} & set(optimizer.state[turned]) == {"slow_ema"}


@pytest.mark.parametrize("lr", [1e-2, 2e-3])
def test_a_move_has_the_length_of_some_steps_of_muon(lr: float) -> None:
    """The root mean square of its matrices is 0.2 times rate and length, nearly."""
    optimizer, moves = first_moves(lr)
    for param, move in zip(optimizer.param_groups[0]["params"][:3], moves):
        size = float(move[1:].square().mean().sqrt()) / (0.2 * lr * LENGTH)
        assert 0.6 < size < 1.3, param.shape


@pytest.mark.parametrize("then", [True, False], ids=["matrices then", "vectors then"])
@pytest.mark.parametrize("stands", [True, False], ids=["predicted", "verified"])
def test_a_checkpoint_in_which_matrices_were_something_else_goes_on(
    then: bool, stands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that stands there is taken out, and no row is kept that is not needed."""
    with monkeypatch.context() as patch:
        if not then:
            patch.setattr(slow_ema, "is_turned", lambda rule, member: False)
        theirs, params = trained()
        before = weights(theirs)
        if stands:
            theirs.step()
        saved = copy.deepcopy(theirs.state_dict())
    if then:
        monkeypatch.setattr(slow_ema, "is_turned", lambda rule, member: False)
    ours = HybridOptimizer(params, lr=0.0, weight_decay=0.0, hybrid=theirs.hybrid)
    ours.load_state_dict(saved)
    ours.param_groups[0]["lr"] = 1e-9
    for param in params:
        param.grad = torch.zeros_like(param)
    ours.step()
    for param, old, hidden in zip(params, before, MOVED):
        torch.testing.assert_close(param.detach(), old, rtol=0, atol=1e-6 if hidden else 0.1)
        row = "direction" if hidden and not then else "slow_ema"
        assert {"direction", "slow_ema"} & set(ours.state[param]) == {row}


def test_no_state_beside_that_of_adamw_takes_more_than_five_bytes() -> None:
    """Of a weight, and four of a 16-bit one; small rows and padding beside."""
    for dtype, most in ((torch.float32, 8 + 5), (torch.bfloat16, 4 + 8 + 4)):
        shapes = ((120, 100), (100, 90), (90, 30), (90, 4))
        optimizer, params = trained(shapes=shapes, dtype=dtype)
        elements = sum(param.numel() for param in params)
        assert 0 <= optimizer.stats().state_bytes_device - most * elements < 600
