"""Every learning-rate scheduler of torch, in both drives, with groups of both rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    make_batches,
    make_model,
    short_config,
    state_copy,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

DRIVES = pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])


def chained(opt: Any) -> Any:
    parts = [schedulers.ConstantLR(opt, total_iters=3), schedulers.ExponentialLR(opt, 0.95)]
    return schedulers.ChainedScheduler(parts, optimizer=opt)


def sequential(opt: Any) -> Any:
    parts = [schedulers.LinearLR(opt, 0.1, total_iters=5), schedulers.CosineAnnealingLR(opt, 20)]
    return schedulers.SequentialLR(opt, parts, [5])


ALL: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda step: 0.97),
    "StepLR": lambda opt: schedulers.StepLR(opt, 4),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [5, 9]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.3, 5),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 1.0, 0.1, 20),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.95),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 20),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 20),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 6),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 1e-2, 4),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 1e-2, total_steps=40),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=1),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
}


def test_none_is_missing() -> None:
    known = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= ALL.keys()


def run(model: nn.Module, optimizer: Any, name: str, steps: int) -> list[list[tuple[Any, ...]]]:
    """The documented loop; returns what the scheduler left in the groups after each step."""
    schedule, batches, seen = ALL[name](optimizer), make_batches(), []
    loss = torch.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "SequentialLR":  # its own parts warn of each other
            warnings.simplefilter("ignore")
        for _ in range(steps):
            if getattr(optimizer, "needs_backward", True):
                loss = backward(model, next(batches))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(loss) if name == "ReduceLROnPlateau" else schedule.step()
            groups = optimizer.param_groups
            seen.append([(float(g["lr"]), g["betas"], g.get("momentum")) for g in groups])
    return seen


@DRIVES
@pytest.mark.parametrize("name", ALL)
def test_sets_what_it_sets_for_adamw_and_the_step_follows(name: str, inline: bool) -> None:
    """The base rule alone has the weights of AdamW under the same schedule."""
    pairs: list[Any] = []
    for kind in (HybridOptimizer, torch.optim.AdamW):
        model = make_model()
        ours = kind is HybridOptimizer
        options = {"hybrid": HybridConfig(predictor="none", inline=inline)} if ours else {}
        optimizer: Any = kind(model.named_parameters(), lr=1e-2, **options)
        seen = [[(g[0], g[1]) for g in groups] for groups in run(model, optimizer, name, 25)]
        pairs.append((weights(optimizer), seen))
    (ours_now, ours_seen), (theirs_now, theirs_seen) = pairs
    assert ours_seen == theirs_seen
    for a, b in zip(ours_now, theirs_now, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@DRIVES
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", ALL)
def test_with_predictions_muon_and_tensor_rates(name: str, tensor: bool, inline: bool) -> None:
    """A learning rate in a tensor is obeyed as one in a float is."""
    found = []
    kinds = (float, lambda rate: torch.tensor(rate, dtype=torch.float64)) if tensor else (float,)
    for wrap in kinds:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)
        )
        groups = split_param_groups(model)
        for group in groups:
            group["lr"] = wrap(1e-2)
        optimizer = HybridOptimizer(groups, hybrid=short_config(inline=inline))
        rates = run(model, optimizer, name, 25)
        assert optimizer.stats().predicted_steps > 3
        assert all(bool(weight.isfinite().all()) for weight in weights(optimizer))
        found.append((weights(optimizer), rates))
    if tensor:
        assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
        for left, right in zip(*(entry[1] for entry in found)):
            for (one, *_), (other, *_) in zip(left, right):
                assert float(one) == pytest.approx(float(other), rel=1e-12)
        for one, other in zip(*(entry[0] for entry in found)):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    if name in ("OneCycleLR", "CyclicLR"):
        muon = [groups[0] for groups in found[0][1]]
        assert len({betas[0] for _, betas, _ in muon}) > 3
        assert [betas[0] for _, betas, _ in muon[:-1]] == [
            momentum for _, _, momentum in muon[1:]
        ], "a step gives Muon's momentum the beta that was cycled"


@DRIVES
def test_groups_added_late_follow_the_schedule(inline: bool) -> None:
    runs = []
    for _ in range(2):
        model, late = make_model(), nn.Linear(5, 5)
        torch.manual_seed(1)
        with torch.no_grad():
            for param in late.parameters():
                param.fill_(0.1)
        config = short_config(inline=inline)
        optimizer = HybridOptimizer(model.named_parameters(), lr=1e-2, hybrid=config)
        run(model, optimizer, "LinearLR", 10)
        optimizer.add_param_group(
            {"params": list(late.named_parameters(prefix="late")), "lr": 2e-2}
        )
        whole = nn.Sequential(model, late)
        moved = [param.detach().clone() for param in late.parameters()]
        seen = run(whole, optimizer, "ExponentialLR", 12)
        assert [groups[1][0] for groups in seen][:2] == pytest.approx([0.019, 0.01805])
        assert all(not torch.equal(a, b) for a, b in zip(moved, late.parameters()))
        saved = optimizer.state_dict()["param_groups"]
        assert saved[1]["param_names"] == ["late.weight", "late.bias"]
        runs.append(optimizer)
    assert_same_weights(*map(weights, runs))
    assert_same_state(*map(state_copy, runs))
