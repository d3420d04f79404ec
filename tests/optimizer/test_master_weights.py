"""How FP32 masters of 16-bit parameters are kept: whole, split, or not at all."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_specs import fewer
from torch import Tensor, nn
from training import (
    assert_same_weights,
    fast_config,
    make_batches,
    make_deep_model,
    make_model,
    masters_of,
    run_with_rejections,
    train,
    weights,
)
from triton_hybrid.kernels.multi_tensor import assembled, remainder_of

from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

PREDICTORS = ("slow_ema", "secant", "linear", "none")
HALVES = (torch.float16, torch.bfloat16)


def make(model: nn.Module, masters: str, backend: str = "torch", **options: Any) -> HybridOptimizer:
    return HybridOptimizer(
        model.parameters(), lr=1e-2, max_grad_norm=1.0, master_weights=masters, backend=backend,
        hybrid=fast_config(**options),
    )  # fmt: skip


# ------------------------------------------------------------------------------- the split

BITS = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(BITS, min_size=1, max_size=64))
def test_split_is_exact_but_for_ties_rounded_down(bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    param = master.bfloat16()
    again = assembled(param, remainder_of(master, param))
    low = torch.tensor(bits) & 0xFFFF
    tie_down = (low == 0x8000) & ((torch.tensor(bits) >> 16) % 2 == 0)
    exact = ~tie_down & ~master.isnan()
    assert torch.equal(again[exact].view(torch.int32), master[exact].view(torch.int32))
    moved = again[tie_down & ~master.isnan()].view(torch.int32)
    kept = master[tie_down & ~master.isnan()].view(torch.int32)
    assert torch.equal(moved, kept - 1)
    assert bool(again[master.isnan()].isnan().all())
    assert torch.equal(again.bfloat16().view(torch.int16)[exact], param.view(torch.int16)[exact])


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_split_has_the_bits_of_whole_masters(predictor: str, inline: bool) -> None:
    """A few thousand updates meet no tie, with this seed.

    Along the slow EMA split masters are moved in place, and those few that are too small beside
    their displacement stay where they are.
    """
    results = []
    for masters in ("auto", "split"):
        model = make_model(torch.bfloat16)
        optimizer = make(model, masters, predictor=predictor, inline=inline)
        run_with_rejections(model, optimizer, 30)
        results.append((weights(optimizer), masters_of(optimizer)))
    if predictor in ALONG:
        assert_close(results[0][1], results[1][1])
        return
    assert_same_weights(results[0][0], results[1][0])
    assert_same_weights(results[0][1], results[1][1])


ALONG = ("slow_ema", "auto")
"""Predictors whose displacement is computed again."""


def assert_close(left: list[Tensor], right: list[Tensor]) -> None:
    """Asserts that no weight is further apart than two steps; few had no prediction."""
    for a, b in zip(left, right, strict=True):
        assert float((a.float() - b.float()).abs().max()) < 2e-2


def test_split_with_muon() -> None:
    results = []
    for masters in ("auto", "split"):
        model = make_deep_model(torch.bfloat16)
        optimizer = HybridOptimizer(
            split_param_groups(model), lr=1e-2, master_weights=masters, hybrid=fast_config()
        )
        train(model, optimizer, 20)
        results.append(masters_of(optimizer))
    assert_close(*results)


@pytest.mark.parametrize(("predictor", "byte"), [("none", 0), ("slow_ema", 1)])
def test_two_bytes_a_parameter_less(predictor: str, byte: int) -> None:
    """But for the byte of weights that predictions move in place."""
    sizes = {}
    for masters in ("auto", "split", "none"):
        model = make_model(torch.bfloat16)
        optimizer = make(model, masters, predictor=predictor)
        train(model, optimizer, 3)
        sizes[masters] = optimizer.stats().state_bytes_device
    numbers = sum(param.numel() for param in make_model().parameters())
    assert sizes["auto"] - sizes["split"] == (2 - byte) * numbers
    assert sizes["auto"] - sizes["none"] == (4 - byte) * numbers


@pytest.mark.parametrize("kinds", [("auto", "split"), ("split", "auto")])
@pytest.mark.parametrize("stop", [4, 7, 9])
def test_checkpoint_goes_on_with_masters_kept_otherwise(kinds: tuple[str, str], stop: int) -> None:
    model = make_model(torch.bfloat16)
    optimizer = make(model, kinds[0], inline=False)
    train(model, optimizer, stop)
    twin = copy.deepcopy(model)
    other = make(twin, kinds[1], inline=False)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if optimizer._binding.progress.controller.stands:
        # What is kept of a prediction that stands is another; it is taken out.
        with optimizer.verified_weights():
            expected = weights(optimizer), masters_of(optimizer)
        other._binding.bind(other.param_groups, other.state)
        assert_same_weights(weights(other), expected[0])
        assert_same_weights(masters_of(other), expected[1])
        train(twin, other, 12)
        return
    for net, chosen in ((model, optimizer), (twin, other)):
        train(net, chosen, 12, make_batches(9))
    assert_close(weights(optimizer), weights(other))
    assert_close(masters_of(optimizer), masters_of(other))


def test_weights_written_from_outside_are_taken_over() -> None:
    model = make_model(torch.bfloat16)
    optimizer = make(model, "split", predictor="none")
    train(model, optimizer, 5)
    param = next(model.parameters())
    with torch.no_grad():
        param.fill_(0.5)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert bool((param == 0.5).all())
    for value in (0.0, -0.0, math.inf, -math.inf):
        param.data.fill_(value)
        optimizer.step()
        assert bool((param == value).all())


# ---------------------------------------------------------------------------------- none


@pytest.mark.parametrize("dtype", HALVES)
def test_none_rounds_every_step_to_nearest(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.tensor([1.0, -3.0], dtype=dtype))
    optimizer = HybridOptimizer(
        [param], lr=1e-2, weight_decay=0.0, master_weights="none",
        hybrid=HybridConfig(predictor="none"),
    )  # fmt: skip
    reference = nn.Parameter(param.detach().float())
    for _ in range(3):
        theirs = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.0)
        param.grad = torch.tensor([1.0, -2.0], dtype=dtype)
        optimizer.step()
        reference.grad = torch.tensor([1.0, -2.0])
        theirs.step()
        reference.data = reference.data.to(dtype).float()
        assert torch.equal(param.detach().float(), reference.detach())
    assert "master" not in optimizer.state[param]
    optimizer.param_groups[0]["lr"] = 1e-6
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before), "less than half a bit is lost"


# ------------------------------------------------------------------------------ arguments


@given(st.sampled_from(("whole", "", None, 2)))
@fewer(4)
def test_bad_value_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="master_weights="):
        HybridOptimizer(make_model().parameters(), master_weights=value)


def test_fp16_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="master_weights='split' with an FP16 parameter"):
        HybridOptimizer(make_model(torch.float16).parameters(), master_weights="split")


@pytest.mark.parametrize("masters", ["split", "none"])
def test_fp32_parameters_have_no_masters(masters: str) -> None:
    results = []
    for kind in ("auto", masters):
        model = make_model()
        optimizer = make(model, kind)
        train(model, optimizer, 10)
        results.append(weights(optimizer))
        for state in optimizer.state.values():
            assert not {"remainder", "master"} & set(state)
    assert_same_weights(*results)
