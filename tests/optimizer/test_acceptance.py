"""What becomes of masters whose prediction is accepted: in the base update, or in a pass before it.

Whatever happens to gradients, groups and weights meanwhile, the bits are the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training import assert_same_state, assert_same_weights, short_config, state_copy, weights
from triton_hybrid.kernels import step, step_torch, verify

from triton_hybrid import HybridOptimizer, Phase

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs without a GPU")
EVENTS = (
    "absent", "all absent but one", "rate of 0", "nan", "huge", "write", "undo", "verified",
    "checkpoint", "scaler skips",
)  # fmt: skip


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """A few that are worked on together, one that is too long for it, and one in another order."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((7, 5), (130,), (), (9000,), (6, 11))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[4] = drawn[4].t().contiguous().t()
    return [nn.Parameter(values.to(dtype)) for values in drawn]


def run(
    dtype: torch.dtype, base: str, backend: str, events: list[str | None], apart: bool,
    **config: Any,
) -> tuple[HybridOptimizer, list[Tensor]]:  # fmt: skip
    """A run in which something happens before each gradient step; the optimizer, all weights.

    ``apart``: with the pass of its own that accepting a prediction took once.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (step, step_torch, verify) if apart else ():
            patch.setattr(module, "placed_by_update", lambda tensors: False)
        params = parameters(dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}]
        hybrid = short_config(max_predict_steps=4, correction_interval=2, **config)
        optimizer = HybridOptimizer(groups, lr=1e-2, base=base, hybrid=hybrid, backend=backend)
        generator, seen = torch.Generator().manual_seed(5), []
        for number, event in enumerate(events):
            while optimizer.phase is Phase.PREDICT:
                optimizer.step()
            for index, param in enumerate(params):
                noise = torch.randn(param.shape, generator=generator)
                grad = 0.5 * param.detach().float() + 0.1 * noise
                grad = grad * (1e4 if event == "huge" else 1.0)
                if event == "nan" and index == 1:
                    grad[number % 130] = math.nan
                gone = (event == "absent" and index == number % 5) or (
                    event == "all absent but one" and index != number % 5
                )
                param.grad = None if gone else grad.to(dtype)
            happen(event, number, optimizer, params)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[1]["lr"] = 1e-2
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
            seen += weights(optimizer)
        return optimizer, seen


def happen(
    event: str | None, number: int, optimizer: HybridOptimizer, params: list[nn.Parameter]
) -> None:
    """What others do between two steps."""
    if event == "rate of 0":
        optimizer.param_groups[1]["lr"] = 0.0
    if event == "write":
        chosen = params[number % 5].data
        chosen[(0,) * chosen.ndim] = 0.75
    if event == "undo":  # as a swap of verified weights would, of one parameter
        master = optimizer.state[params[0]].get("master") if params[0] in optimizer.state else None
        if master is not None:
            params[0].data.copy_(master)
    if event == "verified":
        with optimizer.verified_weights():
            pass
    if event == "checkpoint":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if event == "scaler skips":  # as GradScaler says it to an optimizer that steps by itself
        optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]


def assert_same_runs(*given: Any, **config: Any) -> HybridOptimizer:
    """Asserts that both ways lead to the same bits after every step; returns one of them."""
    (fused, seen), (apart, expected) = (run(*given, way, **config) for way in (False, True))
    assert_same_weights(seen, expected)
    assert_same_state(state_copy(fused), state_copy(apart))
    ledgers = [optimizer._engine.scalars.ledger for optimizer in (fused, apart)]  # type: ignore[union-attr]
    assert_same_weights(ledgers[:1], ledgers[1:])
    return fused


@pytest.mark.parametrize("base", ["adamw", "lion"])
@given(
    events=st.lists(st.sampled_from((None,) * 8 + EVENTS), min_size=14, max_size=24),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    inline=st.booleans(),
)
def test_whatever_happens_the_bits_are_those_of_a_pass_before(
    base: str, events: list[str | None], dtype: torch.dtype, inline: bool
) -> None:
    assert_same_runs(dtype, base, "torch", events, inline=inline)


@ON_CPU
def test_the_same_with_the_kernels() -> None:
    events = [None] * 4 + ["absent", None, "nan", None, "rate of 0", "write", None, "huge", None]
    optimizer = assert_same_runs(torch.bfloat16, "adamw", "triton", events, inline=False)
    assert optimizer.stats().acceptance_rate > 0
