"""`verified_weights`, `eval` and `train`: the weights as the last gradient left them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    fast_config,
    make_batches,
    make_model,
    state_copy,
    train,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

KINDS = [
    (torch.float32, "auto", "slow_ema"),
    (torch.float32, "auto", "linear"),
    (torch.float32, "auto", "secant"),
    (torch.bfloat16, "auto", "slow_ema"),
    (torch.float16, "auto", "linear"),
    (torch.bfloat16, "split", "slow_ema"),
    (torch.bfloat16, "none", "slow_ema"),
]
KIND = pytest.mark.parametrize(("dtype", "masters", "predictor"), KINDS)


def standing(
    dtype: torch.dtype = torch.float32,
    masters: str = "auto",
    predictor: str = "slow_ema",
    **options: Any,
) -> tuple[nn.Module, HybridOptimizer, list[torch.Tensor]]:
    """Stepped training up to a prediction; model, optimizer, and the weights before it."""
    model = make_model(dtype)
    config = fast_config(inline=False, predictor=predictor, confidence_threshold=0.0)
    optimizer = HybridOptimizer(
        model.parameters(), lr=1e-2, master_weights=masters, hybrid=config, **options
    )
    batches, moved = repeated(), False
    for _ in range(60):
        before, phase = weights(optimizer), optimizer.phase
        train(model, optimizer, 1, batches)
        moved = any(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))
        if phase is Phase.PREDICT and moved:
            return model, optimizer, before
    raise AssertionError("no prediction was made")


def repeated() -> Any:
    """One batch again and again: `secant` is for training without noise."""
    batch = next(make_batches(3))
    while True:
        yield batch


@KIND
def test_inside_are_the_weights_before_the_prediction_and_nothing_else_changes(
    dtype: torch.dtype, masters: str, predictor: str
) -> None:
    model, optimizer, before = standing(dtype, masters, predictor)
    twin = copy.deepcopy((model, optimizer))
    predicted, state = weights(optimizer), state_copy(optimizer)
    with optimizer.verified_weights():
        assert_same_weights(weights(optimizer), before)
        for param in model.parameters():
            if "master" in optimizer.state[param]:
                master = optimizer.state[param]["master"]
                assert torch.equal(master.to(dtype), param)
        with optimizer.verified_weights():
            assert_same_weights(weights(optimizer), before)
        assert_same_weights(weights(optimizer), before)
    assert_same_weights(weights(optimizer), predicted)
    assert_same_state(state_copy(optimizer), state)
    assert train(model, optimizer, 25, repeated()) == train(*twin, 25, repeated())
    assert_same_weights(weights(optimizer), weights(twin[1]))
    assert_same_state(state_copy(optimizer), state_copy(twin[1]))


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_inline_and_as_a_switch_every_step_can_be_looked_at(offload: str) -> None:
    model, twin = make_model(), make_model()
    config = fast_config(offload=offload)
    ours, other = (HybridOptimizer(m.parameters(), lr=1e-2, hybrid=config) for m in (model, twin))
    batches, theirs, apart = make_batches(), make_batches(), 0
    for _ in range(25):
        train(model, ours, 1, batches)
        train(twin, other, 1, theirs)
        predicted = weights(ours)
        ours.eval()
        ours.eval()
        apart += any(not torch.equal(a, b) for a, b in zip(predicted, weights(ours)))
        ours.train()
        ours.train()
        assert_same_weights(weights(ours), weights(other))
    assert apart > 5
    assert_same_state(state_copy(ours), state_copy(other))


def test_an_average_of_weights_takes_the_verified_ones_if_asked() -> None:
    model, optimizer, before = standing()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    predicted = weights(optimizer)
    averaged.update_parameters(model)
    with optimizer.verified_weights():
        averaged.update_parameters(model)
    assert_same_weights(weights(optimizer), predicted)
    for mean, moved, verified in zip(averaged.module.parameters(), predicted, before, strict=True):
        assert torch.allclose(mean, (moved + verified) / 2, rtol=1e-6, atol=1e-8)


def test_nothing_is_put_back_where_no_prediction_stands() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=HybridConfig(predictor="none"))
    for steps in (0, 3):
        train(model, optimizer, steps)
        before = weights(optimizer)
        with optimizer.verified_weights():
            assert_same_weights(weights(optimizer), before)
        assert_same_weights(weights(optimizer), before)


@KIND
def test_a_step_without_train_drops_the_prediction(
    dtype: torch.dtype, masters: str, predictor: str
) -> None:
    model, optimizer, before = standing(dtype, masters, predictor)
    rejected = optimizer.stats().rollbacks
    optimizer.eval()
    while optimizer.phase is Phase.PREDICT:
        train(model, optimizer, 1, repeated())
        assert_same_weights(weights(optimizer), before)
    train(model, optimizer, 1, repeated())
    optimizer.train()
    moved = [(a.float() - b.float()).abs().max() for a, b in zip(weights(optimizer), before)]
    assert max(moved) < 2e-2  # one step of AdamW at 1e-2, and no prediction
    assert optimizer.stats().rollbacks == rejected
    train(model, optimizer, 10, repeated())


def test_what_is_written_inside_stands() -> None:
    model, optimizer, before = standing()
    (first, *_) = model.parameters()
    predicted = first.detach().clone()
    with optimizer.verified_weights(), torch.no_grad():
        first[0, 0] = 7.0
    assert first[0, 0] == 7.0
    assert torch.equal(first.flatten()[1:], predicted.flatten()[1:])
    train(model, optimizer, 1)
    assert abs(float(first.detach()[0, 0]) - 7.0) < 0.1
    assert len(before) == 4


@KIND
@pytest.mark.parametrize("replaced", [False, True])
def test_inside_is_what_others_have_written_to_a_parameter_before(
    dtype: torch.dtype, masters: str, predictor: str, replaced: bool
) -> None:
    """As a mask that prunes does after each step."""
    model, optimizer, before = standing(dtype, masters, predictor)
    first, *others = model.parameters()
    masked = first.detach() * (first.detach() > 0)
    if replaced:
        first.data = masked.clone()
    else:
        first.data.copy_(masked)
    predicted = weights(optimizer)
    with optimizer.verified_weights():
        assert torch.equal(first.detach(), masked)
        for param, verified in zip(others, before[1:], strict=True):
            assert torch.equal(param.detach(), verified)
    assert_same_weights(weights(optimizer), predicted)


@KIND
@pytest.mark.parametrize("model_first", [True, False])
def test_a_checkpoint_written_inside_goes_on_bit_for_bit(
    dtype: torch.dtype, masters: str, predictor: str, model_first: bool
) -> None:
    """The prediction returns with the optimizer, or by `train` where the weights come later."""
    model, optimizer, before = standing(dtype, masters, predictor)
    predicted = weights(optimizer)
    with optimizer.verified_weights():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    keys = [set(entry) for entry in saved[1]["state"].values()]
    other = make_model(dtype, seed=5)
    restored = HybridOptimizer(
        other.parameters(), lr=1e-2, master_weights=masters, hybrid=optimizer.hybrid
    )
    if model_first:
        other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    if not model_first:
        other.load_state_dict(saved[0])
        assert_same_weights(weights(restored), before)
        restored.train()
    assert_same_weights(weights(restored), predicted)
    assert "predicted" in set.union(*keys)
    for known, param in zip(keys, other.parameters()):
        assert known - set(restored.state[param]) <= {
            "predicted", "predicted_master", "predicted_remainder", "verified_fingerprint"
        }  # fmt: skip
    assert train(model, optimizer, 20, repeated()) == train(other, restored, 20, repeated())
    assert_same_weights(weights(optimizer), weights(restored))
    assert_same_state(state_copy(optimizer), state_copy(restored))


@KIND
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "optimizer first"])
def test_a_copy_made_inside_goes_on_bit_for_bit(
    dtype: torch.dtype, masters: str, predictor: str, how: str
) -> None:
    model, optimizer, before = standing(dtype, masters, predictor)
    predicted, state = weights(optimizer), state_copy(optimizer)
    with optimizer.verified_weights():
        if how == "pickle":
            other, copied = pickle.loads(pickle.dumps((model, optimizer)))
        elif how == "deepcopy":
            other, copied = copy.deepcopy((model, optimizer))
        else:
            copied, other = copy.deepcopy((optimizer, model))
        assert_same_weights(weights(optimizer), before)
    assert_same_weights(weights(optimizer), predicted)
    assert_same_weights(weights(copied), predicted)
    assert_same_state(state_copy(optimizer), state)
    assert_same_state(state_copy(copied), state)
    assert train(model, optimizer, 20, repeated()) == train(other, copied, 20, repeated())
    assert_same_weights(weights(optimizer), weights(copied))


def test_weights_that_come_after_the_optimizer_may_have_been_there_before() -> None:
    model, optimizer, _ = standing()
    predicted = weights(optimizer)
    with optimizer.verified_weights():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = make_model(seed=5)
    restored = HybridOptimizer(other.parameters(), lr=1e-2, hybrid=optimizer.hybrid)
    with torch.no_grad():  # as those of a LayerNorm may be, which begin as ones in every model
        next(other.parameters()).copy_(next(iter(saved[0].values())))
    restored.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    restored.train()
    assert_same_weights(weights(restored), predicted)


def test_a_checkpoint_written_inside_and_loaded_beside_other_weights_leaves_them() -> None:
    _, optimizer, _ = standing(torch.bfloat16)
    with optimizer.verified_weights():
        saved = copy.deepcopy(optimizer.state_dict())
    other = make_model(torch.bfloat16, seed=5)
    before = [param.detach().clone() for param in other.parameters()]
    restored = HybridOptimizer(other.parameters(), lr=1e-2, hybrid=optimizer.hybrid)
    restored.load_state_dict(saved)
    restored.train()
    assert_same_weights(weights(restored), before)
    train(other, restored, 12)
    for param in other.parameters():
        assert torch.equal(restored.state[param]["master"].to(torch.bfloat16), param)


def test_loading_inside_ends_it() -> None:
    model, optimizer, before = standing()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    optimizer.load_state_dict(saved)
    optimizer.train()
    assert_same_weights(weights(optimizer), before)
    train(model, optimizer, 5)


def test_a_hook_may_wrap_what_is_saved_inside() -> None:
    """What was put aside was added after all hooks, and was looked for in what they returned."""
    _, optimizer, _ = standing()
    with optimizer.verified_weights():
        plain = optimizer.state_dict()
        optimizer.register_state_dict_post_hook(lambda _, made: {"wrapped": made})
        wrapped = optimizer.state_dict()
    assert wrapped["wrapped"]["state"].keys() == plain["state"].keys()
    assert "predicted" in wrapped["wrapped"]["state"][0]
