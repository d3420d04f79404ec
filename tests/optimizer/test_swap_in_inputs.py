"""What people give to the optimizer: gradients, losses, options, and parameters of any kind.

It is as lenient as torch's AdamW is.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_memory import DEVICE
from test_swap_in_protocol import DRIVES, LR, NONE, assert_close
from torch import Tensor, nn
from training import (
    assert_same_weights,
    feed,
    short_config,
    small_run,
    to_correct,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups

# ---------------------------------------------------------------------------------- H: the judge


@DRIVES
@pytest.mark.parametrize("masked", [1, 3])
def test_a_gradient_of_zero_is_no_sample_of_the_usual_norm(masked: int, inline: bool) -> None:
    params, optimizer = small_run(inline=inline)
    feed(optimizer, 20)
    for _ in range(masked):
        while not optimizer.needs_backward:
            optimizer.step()
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    to_correct(optimizer)
    before = optimizer.stats().rollbacks
    feed(optimizer, scale=1e4, seed=99)
    assert optimizer.stats().rollbacks == before + 1


def test_a_gradient_that_no_predict_step_reads_is_mentioned_once() -> None:
    params, optimizer = small_run(inline=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            for param in params:
                param.grad = torch.ones_like(param) * (1 + step % 2)
            optimizer.step()
    found = [str(entry.message) for entry in caught if entry.category is UserWarning]
    assert len(found) == 1
    assert "needs_backward" in found[0]


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_left_from_the_step_that_read_them_are_not_mentioned(accumulates: bool) -> None:
    """As in loops that zero them before each backward pass."""
    params, optimizer = small_run(inline=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            if optimizer.needs_backward:
                optimizer.zero_grad(set_to_none=not accumulates)
                sum(param.square().sum() for param in params).backward()
            optimizer.step()
    optimizer.zero_grad()

    def compute_them_always() -> None:
        for _ in range(30):
            sum(param.square().sum() for param in params).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="needs_backward"):
        compute_them_always()


def run_with_losses(inline: bool = True, **options: Any) -> HybridOptimizer:
    """At a predicted point, after windows of two losses around five."""
    _, optimizer = small_run(inline=inline, **options)
    for step in range(60):
        if step > 20 and optimizer.phase is Phase.CORRECT:
            break
        for part in (-1.0, 1.0):
            optimizer.observe_loss(5.0 + part + 0.1 * math.sin(step))
        feed(optimizer, seed=step)
    assert optimizer.phase is Phase.CORRECT
    return optimizer


@DRIVES
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rise", [1e3, -1e3])
def test_a_loss_that_goes_the_wrong_way_rejects(rise: float, maximize: bool, inline: bool) -> None:
    optimizer = run_with_losses(inline, maximize=maximize)
    before = optimizer.stats().divergences["loss"]
    optimizer.observe_loss(5.0 + rise)
    feed(optimizer, seed=99)
    assert optimizer.stats().divergences["loss"] - before == int((rise > 0) != maximize)


@pytest.mark.parametrize("parts", [(1e4, 5.0), (5.0, 1e4), (5.0, 1e4, 5.0)], ids=str)
def test_losses_of_one_window_are_averaged(parts: tuple[float, ...]) -> None:
    """One bad micro-batch tells, wherever it stands in the window."""
    optimizer = run_with_losses()
    before = optimizer.stats().divergences["loss"]
    for part in parts:
        optimizer.observe_loss(part)
    feed(optimizer, seed=99)
    assert optimizer.stats().divergences["loss"] == before + 1


@pytest.mark.parametrize("lr", [1e-2, 1e-1])
def test_ascent_on_a_saddle_is_no_worse_than_adamws(lr: float) -> None:
    """Maximised, the loss rises for ever, which is no reason to roll anything back."""
    curvature = torch.linspace(-1, 1.2, 50)
    ends = []
    for predictor in ("none", "slow_ema"):
        param = nn.Parameter(torch.linspace(0.5, 1.5, 50))
        config = HybridConfig(predictor=predictor)
        optimizer = HybridOptimizer([param], lr, maximize=True, hybrid=config)
        for _ in range(60):
            loss = (curvature * param.square()).sum()
            param.grad = None
            loss.backward()
            optimizer.observe_loss(loss.detach())
            optimizer.step()
        ends.append(float((curvature * param.detach().square()).sum()))
    assert optimizer.stats().divergences["loss"] == 0
    assert ends[1] > ends[0] - 1e-3 * abs(ends[0])


# ---------------------------------------------------------------------- J: as lenient as torch's


FROZEN: dict[str, Tensor] = {
    "int8": torch.ones(3, dtype=torch.int8),
    "int64": torch.ones(3, dtype=torch.int64),
    "bool": torch.ones(3, dtype=torch.bool),
    "complex": torch.ones(3, dtype=torch.complex64),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "expanded": torch.ones(3).expand(2, 3),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_of_any_kind_are_taken(kind: str) -> None:
    still = nn.Parameter(FROZEN[kind], requires_grad=False)
    moving = nn.Parameter(torch.ones(4, 3))
    optimizer = HybridOptimizer([still, moving], LR, hybrid=short_config())
    for _ in range(8):
        moving.grad = torch.ones_like(moving)
        optimizer.step()
    assert torch.equal(still.to(torch.complex64), torch.ones_like(still, dtype=torch.complex64))
    assert not torch.equal(moving, torch.ones(4, 3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True}, {"fused": False}, {"fused": None}, {"foreach": True}, {"foreach": None},
        {"amsgrad": False}, {"differentiable": False}, {"lr": np.float32(1e-2)},
        {"lr": np.float64(1e-2)}, {"lr": np.array(1e-2)}, {"lr": torch.tensor(1e-2)},
        {"betas": [0.9, 0.999]}, {"weight_decay": np.float32(0.0)}, {"weight_decay": 0},
        {"betas": (np.float64(0.9), 0.999)},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_adamw_takes(options: dict[str, Any]) -> None:
    params, optimizer = small_run(**options)
    feed(optimizer, 8)
    assert all(bool(torch.isfinite(param).all()) for param in params)
    group = {"params": [nn.Parameter(torch.ones(2))], **options}
    optimizer.add_param_group(group)
    feed(optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
def test_options_that_change_the_result_are_refused_by_name(name: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=f"{name}=True"):
        small_run(**{name: True})


def test_lazy_parameters_are_taken_and_train_once_they_have_a_shape() -> None:
    runs = []
    for kind in (HybridOptimizer, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
        options = {"hybrid": NONE} if kind is HybridOptimizer else {}
        optimizer: Any = kind(model.parameters(), LR, **options)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        runs.append(weights(optimizer))
    assert_close(*runs)


@pytest.mark.parametrize("predictor", ["none", "slow_ema"])
@pytest.mark.parametrize(
    "make_view",
    [
        lambda: torch.ones(10, 5, 2)[..., 0],
        lambda: torch.ones(4, 4)[:, ::2],
        lambda: torch.ones(8)[1::3],
        lambda: torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last),
        lambda: torch.ones(6, 4).t(),
        lambda: torch.ones(()),
        lambda: torch.ones(0, 3),
    ],
    ids=["last", "columns", "every_third", "channels_last", "transposed", "scalar", "empty"],
)
def test_parameters_of_any_layout(make_view: Callable[[], Tensor], predictor: str) -> None:
    """They train as dense ones do, and what lies in the gaps is left alone."""
    view = make_view()
    runs = []
    for param in (nn.Parameter(view), nn.Parameter(view.clone().contiguous())):
        optimizer = HybridOptimizer([param], LR, hybrid=short_config(predictor=predictor))
        feed(optimizer, 12)
        runs.append(param.detach())
    assert torch.allclose(*runs, rtol=1e-6, atol=1e-7)
    storage = torch.empty(0).set_(view.untyped_storage())  # type: ignore[call-overload]
    assert int((storage == 1).sum()) == storage.numel() - view.numel()


# ------------------------------------------------------------------------------------ K: smaller


def test_one_cycle_moves_the_momentum_of_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    runs = []
    for ours in (True, False):
        params = [nn.Parameter(torch.eye(4, 3))]
        optimizer: Any = (
            HybridOptimizer(
                params, LR, base="muon", weight_decay=0.1, hybrid=NONE, ns_dtype="bfloat16",
                adjust_lr_fn="original",
            )
            if ours
            else torch.optim.Muon(params, LR)
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=20)
        for step in range(18):
            feed(optimizer, seed=step)
            schedule.step()
        runs.append(params)
    assert_close(*runs)


class Wrapped(nn.Module):
    """A module under one more name, as adapters and checkpointing wrap it."""

    def __init__(self, name: str, module: nn.Module, within: bool) -> None:
        super().__init__()
        self.add_module(name, nn.ModuleDict({"default": module}) if within else module)


@pytest.mark.parametrize(
    ("name", "within"), [("modules_to_save", True), ("_checkpoint_wrapped_module", False)]
)
def test_a_wrapped_head_is_no_hidden_matrix(name: str, within: bool) -> None:
    head = nn.Linear(8, 6)
    model = nn.Module()
    model.add_module("embed", nn.Embedding(11, 8))
    model.add_module("score", Wrapped(name, head, within))
    model.add_module("hidden", nn.Linear(8, 8))
    muon, adamw = split_param_groups(model)
    assert [param.shape for param in muon["params"]] == [(8, 8)]
    assert any(param is head.weight for param in adamw["params"])


def test_the_outputs_of_a_fused_adapter_are_cut() -> None:
    model = nn.Module()
    model.add_module("embed", nn.Embedding(11, 8))
    layer = nn.Module()
    layer.add_module("lora_A", nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)}))
    layer.add_module("lora_B", nn.ModuleDict({"default": nn.Linear(2, 24, bias=False)}))
    model.add_module("c_attn", layer)
    group = split_param_groups(model)[0]
    found = {tuple(p.shape): blocks for p, blocks in zip(group["params"], group["blocks"])}
    assert found == {(2, 8): (1, 1), (24, 2): (3, 1)}


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["accepted", "rejected"])
def test_two_parameters_on_one_storage_roll_back_together(scale: float) -> None:
    first = nn.Parameter(torch.ones(4, 3))
    params = [first, nn.Parameter(first.data), nn.Parameter(torch.ones(5))]
    optimizer = HybridOptimizer(params, LR, hybrid=short_config(inline=False))
    verified = to_correct(optimizer)
    moved = weights(optimizer)
    feed(optimizer, scale=scale, seed=99)
    assert_same_weights(moved[:2], verified[:2])  # no prediction moves them
    if scale == 1:
        assert all(float((p - q).abs().max()) <= 2.5 * LR for p, q in zip(params, moved))
    else:
        assert_same_weights(weights(optimizer), verified)


def test_orthogonalisation_runs_in_the_dtype_of_the_device() -> None:
    """BF16 products are slow on CPUs: there it is FP32 unless asked for."""
    runs = []
    for options in ({}, {"ns_dtype": "float32"}):
        _, optimizer = small_run(base="muon", **options)
        feed(optimizer, 6)
        runs.append(weights(optimizer))
    assert_same_weights(*runs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("beta2", [0.999, 0.99999, 1 - 1e-7])
def test_the_first_step_at_slow_second_moments(beta2: float, backend: str) -> None:
    """``1 - beta2`` is exact: the first step is that of AdamW in FP64."""
    moves = []
    for kind, dtype in ((HybridOptimizer, torch.float32), (torch.optim.AdamW, torch.float64)):
        param = nn.Parameter(torch.zeros(5, dtype=dtype, device=DEVICE))
        options = {"hybrid": NONE, "backend": backend} if kind is HybridOptimizer else {}
        optimizer: Any = kind([param], LR, betas=(0.9, beta2), weight_decay=0.0, **options)
        param.grad = torch.linspace(0.5, 2, 5, dtype=dtype, device=DEVICE)
        optimizer.step()
        moves.append(param.detach().double().cpu())
    assert torch.allclose(*moves, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("loss", [None, "one", [1.0], 1j, torch.tensor(1j), torch.ones(2)])
def test_what_is_no_loss_is_refused_at_once(loss: Any, bound: bool) -> None:
    _, optimizer = small_run()
    _, other = small_run()
    if bound:
        feed(optimizer)
        feed(other)
    with pytest.raises(ValueError, match=r"^loss"):
        optimizer.observe_loss(loss)
    feed(optimizer, 6)
    feed(other, 6)
    assert_same_weights(weights(optimizer), weights(other))


@pytest.mark.parametrize(
    ("name", "value"),
    [("base", "x"), ("betas", (0.9,)), ("eps", None), ("lr", "x"), ("weight_decay", "x")],
)
@pytest.mark.parametrize("steps", [0, 5])
def test_what_somebody_sets_in_a_group_is_refused_by_name(
    name: str, value: Any, steps: int
) -> None:
    _, optimizer = small_run()
    feed(optimizer, steps)
    group, before = optimizer.param_groups[0], weights(optimizer)
    known, group[name] = group[name], value
    with pytest.raises(ValueError, match=f"^{name}="):
        feed(optimizer)
    assert_same_weights(weights(optimizer), before)
    group[name] = known
    feed(optimizer, 5)


def test_a_set_of_parameters_is_refused() -> None:
    params = {nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))}
    with pytest.raises(TypeError, match="ordered"):
        HybridOptimizer([{"params": params}])


def test_before_a_verdict_no_share_is_shown() -> None:
    _, optimizer = small_run()
    feed(optimizer)
    assert "nan" not in str(optimizer.stats())
