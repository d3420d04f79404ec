"""Loss scaling inside the step, and torch's GradScaler outside of it."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, Checked
from kernel_problems import Problem
from kernel_specs import fewer, plain, some
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    run_of,
    state_copy,
    until,
    weights,
)
from triton_hybrid.kernels.ledger import INDEX, read_ledger, write_ledger
from triton_hybrid.kernels.ledger_torch import entries_of, move_loss_scale_torch
from triton_hybrid.kernels.scalar_math import write

from triton_hybrid import HybridConfig, HybridOptimizer, Phase
from triton_hybrid.rules import RULES

OFF = HybridConfig(predictor="none")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scale_of(optimizer: HybridOptimizer) -> float:
    return float(optimizer.scale_loss(torch.ones(())))


# ------------------------------------------------------------------ the scale's own rule

SCALES = st.sampled_from((65536.0, 1.0, 3.0, 2.0**-148, 2.0**-149, 2.0**127, 1e38, 1.1))
TRACKERS = st.sampled_from((0, 1, 1998, 1999, 2000))
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


@example(scale=65536.0, tracker=2000, nonfinite=False)  # beyond the interval torch never grows it
@given(scale=SCALES, tracker=TRACKERS, nonfinite=st.booleans())
def test_scale_moves_as_torch_moves_it(scale: float, tracker: int, nonfinite: bool) -> None:
    theirs = torch.tensor(scale)
    count = torch.tensor(tracker, dtype=torch.int32)
    torch._amp_update_scale_(theirs, count, torch.tensor(float(nonfinite)), 2.0, 0.5, 2000)
    start = {"loss_scale": float(torch.tensor(scale)), "growth_tracker": tracker}
    ours = write_ledger(start, torch.device("cpu"))
    entries = entries_of(ours)
    move_loss_scale_torch(entries, nonfinite)
    write(ours, entries)
    assert float(ours[INDEX["loss_scale"]]) == float(theirs)
    # Torch counts on where a tracker has passed its interval, which never happens.
    if tracker < 2000:
        assert int(ours[INDEX["growth_tracker"]]) == int(count)


@BACKENDS
@given(scale=SCALES, tracker=TRACKERS, nonfinite=st.booleans())
@fewer(6)
def test_step_moves_the_scale(
    backend: Checked, scale: float, tracker: int, nonfinite: bool
) -> None:
    problem = Problem(plain((5,), (3, 4)))
    problem.note(loss_scale=float(torch.tensor(scale)), growth_tracker=tracker)
    expected = problem.ledger.clone()
    entries = entries_of(expected)
    move_loss_scale_torch(entries, torch.tensor(nonfinite, device=expected.device))
    write(expected, entries)
    if nonfinite:
        problem.rows["grad"][1][0, 0] = math.inf
    backend.step(problem)
    for name in ("loss_scale", "growth_tracker"):
        assert float(problem.ledger[INDEX[name]]) == float(expected[INDEX[name]]), name


@BACKENDS
@EVERY_RULE
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_unscaled_bit_for_bit(backend: Checked, rule: str, max_norm: float | None) -> None:
    usual, scaled = (Problem(some(rule=rule), rule=rule) for _ in "ab")
    scaled.note(loss_scale=1024.0)
    for grad in scaled.rows["grad"]:
        grad.mul_(1024.0)
    for problem in (usual, scaled):
        backend.step(problem, max_norm=max_norm)
    scaled.assert_same(usual, rows=usual.state)
    norms = [read_ledger(problem.ledger)["norm"] for problem in (usual, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-12)


@BACKENDS
@EVERY_RULE
def test_flag_of_a_grad_scaler_skips(backend: Checked, rule: str) -> None:
    problem = Problem(some(rule=rule), rule=rule)
    problem.note(found_inf=1.0)
    before = problem.snapshot()
    backend.step(problem)
    problem.assert_unchanged(before, but=problem.worked_out)
    entries = read_ledger(problem.ledger)
    assert (entries["skipped"], entries["found_inf"]) == (1, 0)


# --------------------------------------------------------------------- through the optimizer


@pytest.mark.parametrize("kind", ["fp32", "muon"])
@pytest.mark.parametrize("inline", [True, False])
def test_scaling_changes_no_bit(inline: bool, kind: str) -> None:
    """A power of two passes through FP32 unchanged, in every phase."""
    results = []
    for loss_scale in (None, 4096.0):
        options = {"max_grad_norm": 1.0, "loss_scale": loss_scale, "inline": inline}
        model, optimizer = run_of(kind, **options)
        batches = make_batches()
        phases = set()
        for _ in range(40):
            phases.add(optimizer.phase)
            if optimizer.needs_backward:
                scale = [optimizer.scale_loss] * (loss_scale is not None)
                optimizer.observe_loss(backward(model, next(batches), *scale))
            optimizer.step()
            optimizer.zero_grad()
        assert Phase.CORRECT in phases
        results.append((weights(optimizer), state_copy(optimizer)))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1], but=("prediction",))


@given(
    overflows=st.lists(st.integers(0, 59), max_size=12),
    dtype=st.sampled_from(DTYPES),
    inline=st.booleans(),
    value=st.sampled_from((math.inf, -math.inf, math.nan)),
)
@fewer(8)
def test_survives_overflows_as_grad_scaler_does(
    overflows: Sequence[int], dtype: torch.dtype, inline: bool, value: float
) -> None:
    model = make_model(dtype)
    optimizer = HybridOptimizer(
        model.parameters(), lr=1e-2, loss_scale="dynamic", hybrid=fast_config(inline=inline)
    )
    theirs = torch.amp.GradScaler("cpu", init_scale=65536.0)
    dummy = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([dummy], lr=0.0)
    batches = make_batches()
    for step in range(60):
        if not optimizer.needs_backward:
            optimizer.step()
            continue
        backward(model, next(batches), optimizer.scale_loss)
        overflow = step in overflows
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        if overflow:
            grads[random.Random(step).randrange(len(grads))].flatten()[-1] = value
        # FP16 gradients of a scaled loss may overflow by themselves.
        overflow = not all(bool(grad.isfinite().all()) for grad in grads)
        before, state, phase = weights(optimizer), state_copy(optimizer), optimizer.phase
        optimizer.step()
        optimizer.zero_grad()
        theirs.scale(torch.ones(()))
        dummy.grad = torch.full((1,), math.inf if overflow else 1.0)
        theirs.step(reference)
        theirs.update()
        assert scale_of(optimizer) == theirs.get_scale()
        rolled_back = phase is Phase.CORRECT and optimizer.phase is Phase.FULL
        if overflow and not rolled_back:
            assert_same_weights(weights(optimizer), before)
            if state[0]:  # the first step makes it
                assert_same_state(state_copy(optimizer), state)
            assert optimizer.phase is phase
    stats = optimizer.stats()
    assert stats.loss_scale == theirs.get_scale()
    assert all(bool(weight.isfinite().all()) for weight in weights(optimizer))


@pytest.mark.parametrize("loss_scale", ["dynamic", 1000.0])
def test_scale_is_known_before_the_first_step_and_after_a_checkpoint(
    loss_scale: float | str,
) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), loss_scale=loss_scale, hybrid=OFF)
    first = 65536.0 if loss_scale == "dynamic" else 1000.0
    assert scale_of(optimizer) == optimizer.stats().loss_scale == first
    for step in range(4):
        backward(model, next(make_batches(step)), optimizer.scale_loss)
        if step == 2:
            next(model.parameters()).grad[0, 0] = math.nan  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
    expected = first / 2 if loss_scale == "dynamic" else first
    assert scale_of(optimizer) == expected
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    other = HybridOptimizer(twin.parameters(), loss_scale=loss_scale, hybrid=OFF)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert scale_of(other) == other.stats().loss_scale == expected
    for net, chosen in ((model, optimizer), (twin, other)):
        backward(net, next(make_batches(9)), chosen.scale_loss)
        chosen.step()
    assert_same_weights(weights(optimizer), weights(other))
    fresh = HybridOptimizer(twin.parameters(), hybrid=OFF)
    fresh.load_state_dict(optimizer.state_dict())
    backward(twin, next(make_batches(9)))
    fresh.step()
    assert fresh.stats().loss_scale == 1.0, "a checkpoint's scale is not that of an unscaled run"


def test_growth_after_two_thousand_finite_gradients() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = HybridOptimizer([param], lr=0.0, loss_scale="dynamic", hybrid=OFF)
    for taken in (0, *range(1995, 2001)):
        param.grad = torch.full((2,), 1.0)
        if taken:
            optimizer._engine.scalars.ledger[INDEX["growth_tracker"]] = taken % 2000
        optimizer.step()
        assert scale_of(optimizer) == (65536.0 if taken < 1999 else 131072.0)


# --------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_scaler_drives_it(dtype: torch.dtype, inline: bool, clip: bool) -> None:
    """The same weights as without scaling: unscaling by a power of two is exact.

    FP16 gradients cannot be unscaled outside: clipping them is the optimizer's.
    """
    half = dtype is torch.float16
    results = []
    for scaled in (False, True):
        model = make_model(dtype)
        optimizer = HybridOptimizer(
            model.parameters(),
            lr=1e-2,
            max_grad_norm=0.1 if clip and half else None,
            hybrid=fast_config(inline=inline),
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=scaled)
        batches = make_batches()
        for step in range(40):
            if not optimizer.needs_backward:
                optimizer.step()
                continue
            backward(model, next(batches), scaler.scale)
            if clip and not half:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if step in (9, 17):
                next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
            phase, steps = optimizer.phase, optimizer.stats().steps
            scaler.step(optimizer)
            scaler.update()
            if scaled and step in (9, 17) and phase is not Phase.CORRECT:
                assert optimizer.phase is phase  # promise 5
                # Clipped, or in FP16, the optimizer sees for itself what it must skip.
                assert clip or half or optimizer.stats().steps == steps
            optimizer.zero_grad()
        assert optimizer.stats().loss_scale == 1.0
        results.append(weights(optimizer))
    for plain_weight, scaled_weight in zip(*results):
        # BF16 and FP16 gradients of a scaled loss may round otherwise below their normal range.
        assert torch.allclose(plain_weight.float(), scaled_weight.float(), rtol=2e-2, atol=2e-2)
    assert all(bool(weight.isfinite().all()) for weight in results[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_scaler_steps_through_predict(dtype: torch.dtype) -> None:
    """A loop that calls the GradScaler at every step, and skips backward where it may."""
    runs = []
    for always in (False, True):
        model = make_model(dtype)
        config = fast_config(inline=False)
        optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        batches = make_batches()
        for _ in range(40):
            if optimizer.needs_backward:
                backward(model, next(batches), scaler.scale)
            if always or optimizer.needs_backward:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert optimizer.stats().predicted_steps > 5
        runs.append(weights(optimizer))
    assert_same_weights(*runs)


def test_a_gradient_for_the_grad_scaler_is_taken_back() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config(inline=False))
    until(optimizer, model, Phase.PREDICT)
    for _ in range(2):
        assert optimizer._step_supports_amp_scaling is True
    optimizer.step()
    assert all(param.grad is None for param in model.parameters())


def test_grad_scaler_protocol_only_where_it_is_needed() -> None:
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        optimizer = HybridOptimizer(make_model(dtype).parameters())
        assert optimizer._step_supports_amp_scaling is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_at_once_is_an_error(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = HybridOptimizer(model.parameters(), loss_scale="dynamic")
    scaler = torch.amp.GradScaler("cpu")
    backward(model, next(make_batches()), scaler.scale)
    before = weights(optimizer)
    with pytest.raises(RuntimeError, match="loss_scale is set, and a GradScaler is used"):
        scaler.step(optimizer)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="loss_scale is set, and a GradScaler is used"):
        optimizer.step()
    assert_same_weights(weights(optimizer), before)


def test_a_refused_gradient_leaves_no_scale_behind() -> None:
    embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.float16)
    optimizer = HybridOptimizer(embedding.parameters(), hybrid=OFF)
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    embedding.weight.grad = torch.eye(4, 3, dtype=torch.float16).to_sparse()
    optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.stats().loss_scale == 1.0


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "auto", True, 1e39, 1e-60])
def test_bad_scale_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="loss_scale="):
        HybridOptimizer(make_model().parameters(), loss_scale=value)


def test_scale_loss_without_scaling_is_an_error() -> None:
    optimizer = HybridOptimizer(make_model().parameters())
    with pytest.raises(RuntimeError, match="loss_scale='dynamic'"):
        optimizer.scale_loss(torch.ones(()))
