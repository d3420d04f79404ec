"""What people do to the optimizer itself: its state, hooks and checkpoints.

What torch documents for its optimizers holds here, whatever the ambient settings are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import (
    assert_same_state,
    assert_same_weights,
    feed,
    short_config,
    small_run,
    state_copy,
    to_correct,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

LR = 1e-2
NONE = HybridConfig(predictor="none")
DRIVES = pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])


def small_adamw() -> Any:
    params, _ = small_run()
    return params, torch.optim.AdamW(params, LR)


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predictor", ["none", "slow_ema", "linear", "secant"])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_graph_older_than_a_step_is_an_error_as_with_adamw(predictor: str, phase: Phase) -> None:
    """Its gradients would be computed with other weights than those it was made with."""
    if predictor == "none" and phase in (Phase.PREDICT, Phase.CORRECT):
        pytest.skip("there is no such phase")
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(DEVICE)
    frozen = nn.Parameter(torch.ones(3, device=DEVICE))  # without a gradient
    config = short_config(predictor=predictor, warmup_steps=2, inline=False)
    optimizer = HybridOptimizer([*model.parameters(), frozen], hybrid=config)
    x = torch.randn(8, 4, device=DEVICE, requires_grad=True)
    for _ in range(20):
        if optimizer.phase is phase:
            break
        if optimizer.needs_backward:
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.phase is phase
    old, other = model(x).square().mean(), (frozen * frozen).sum()
    if optimizer.needs_backward:
        model(x).square().mean().backward()
    optimizer.step()
    if predictor != "linear":  # which writes every weight again where its cycle begins
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rollback_raises_versions_of_what_has_no_gradient_any_more(backend: str) -> None:
    params = [nn.Parameter(torch.ones(4, device=DEVICE)) for _ in range(2)]
    optimizer = HybridOptimizer(params, hybrid=short_config(), backend=backend)
    while optimizer.phase is not Phase.CORRECT:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    params[0].grad, params[1].grad = torch.ones_like(params[0]), None
    moved, graph = params[1].detach().clone(), (params[1] * params[1]).sum()
    optimizer.observe_loss(float("inf"))
    optimizer.step()
    assert not torch.equal(moved, params[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


# ------------------------------------------------------------------------------ F: the protocol


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "clear": lambda state, params: state.clear(),
    "del": lambda state, params: state.pop(params[1]),
    "replace": lambda state, params: state[params[0]].update(exp_avg=torch.full((4, 3), -3.0)),
    "write": lambda state, params: state[params[0]]["exp_avg_sq"].mul_(100.0),
    "other": lambda state, params: state.update({params[1]: copy.deepcopy(state[params[0]])}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_state_is_what_goes_on_as_with_adamw(change: str) -> None:
    (ours, optimizer), (theirs, adamw) = small_run(hybrid=NONE), small_adamw()
    for other, params in ((optimizer, ours), (adamw, theirs)):
        feed(other, 10)
        CHANGES[change](other.state, params)
        feed(other, 5, seed=1)
    assert_close(ours, theirs)
    saved = optimizer.state_dict()["state"]
    for index, entry in adamw.state_dict()["state"].items():
        assert float(saved[index]["step"]) == float(entry["step"])
        assert torch.allclose(saved[index]["exp_avg"], entry["exp_avg"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", range(12, 16))
@DRIVES
@pytest.mark.parametrize("change", CHANGES)
def test_state_changed_in_any_phase_keeps_the_run_sound(
    change: str, inline: bool, stop: int
) -> None:
    params, optimizer = small_run(inline=inline)
    feed(optimizer, stop)
    before = weights(optimizer)
    CHANGES[change](optimizer.state, params)
    feed(optimizer, scale=1e4, seed=99)
    assert len(set(feed(optimizer, 10))) > 1  # it goes on from phase to phase
    for now, then in zip(weights(optimizer), before, strict=True):
        assert float((now - then).abs().max()) < 30 * 4 * LR
    assert all({"step", "exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys() for p in params)
    assert len(optimizer.state_dict()["state"]) == 2


def fill_moments(state: Any) -> None:
    for entry in state.values():
        entry["exp_avg"].fill_(-2.0)


def other_moments(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(state_dict)
    fill_moments(changed["state"])
    return changed


HOOKS: dict[str, Callable[..., Any]] = {
    "moments": other_moments,
    "unwrap": lambda optimizer, state_dict: state_dict["optimizer"],
    "post": lambda optimizer: fill_moments(optimizer.state),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_load_hooks_have_the_last_word(hook: str) -> None:
    """What a pre-hook returns is loaded, what a post-hook writes is used."""
    runs = []
    for params, optimizer in (small_run(hybrid=NONE), small_adamw()):
        feed(optimizer, 6)
        saved = copy.deepcopy(optimizer.state_dict())
        when = "post" if hook == "post" else "pre"
        getattr(optimizer, f"register_load_state_dict_{when}_hook")(HOOKS[hook])
        optimizer.load_state_dict({"optimizer": saved} if hook == "unwrap" else saved)
        feed(optimizer, 3)
        runs.append(params)
    assert_close(*runs)


@pytest.mark.parametrize("change", ["reordered", "longer"])
@pytest.mark.parametrize("hybrid", [True, False])
def test_state_of_other_shapes_is_refused_before_anything_changes(
    change: str, hybrid: bool
) -> None:
    """A checkpoint whose parameters came in another order, or were of another model."""
    shapes = {"reordered": [(2,), (4, 3)], "longer": [(5, 3), (2,)]}[change]
    others = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    source = HybridOptimizer(others, hybrid=short_config()) if hybrid else torch.optim.AdamW(others)
    feed(source, 5)
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))]
    optimizer = HybridOptimizer(params, LR, hybrid=short_config())
    feed(optimizer, 7)
    before, phase = state_copy(optimizer), optimizer.phase
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict(source.state_dict())
    assert (optimizer.phase, optimizer.param_groups[0]["lr"]) == (phase, LR)
    assert_same_state(state_copy(optimizer), before)


def test_state_that_belongs_to_no_parameter_is_kept() -> None:
    _, optimizer = small_run()
    feed(optimizer, 4)
    optimizer.state["ema"] = 0.5
    feed(optimizer, 4)
    assert optimizer.stats().steps > 0
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"]["ema"] == 0.5
    _, other = small_run()
    other.load_state_dict(saved)
    assert other.state["ema"] == 0.5
    assert other.phase is optimizer.phase


@DRIVES
def test_a_checkpoint_of_adamw_loaded_at_a_predicted_point_ends_the_stretch(inline: bool) -> None:
    theirs, adamw = small_adamw()
    feed(adamw, 20)
    params, optimizer = small_run(inline=inline)
    to_correct(optimizer)
    with torch.no_grad():
        for param, values in zip(params, theirs):
            param.copy_(values)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert optimizer.phase not in (Phase.CORRECT, Phase.PREDICT)
    feed(optimizer, seed=99)
    feed(adamw, seed=99)
    for now, then in zip(params, theirs):
        # A prediction may follow inline.
        limit = 8 * LR if inline else 1e-6
        assert float((now - then).abs().max()) <= limit


@DRIVES
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["accepted", "rejected"])
def test_a_checkpoint_loaded_beside_other_weights_leaves_them(scale: float, inline: bool) -> None:
    """The optimizer's checkpoint was written at a predicted point; the weights are new ones."""
    _, optimizer = small_run(inline=inline)
    to_correct(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    params, other = small_run(inline=inline)
    with torch.no_grad():
        for param in params:
            param.fill_(6.0)
    other.load_state_dict(saved)
    feed(other, scale=scale, seed=99)
    for param in params:
        assert float((param - 6).abs().max()) <= 4 * LR


def test_loading_adds_no_key_to_the_groups() -> None:
    _, optimizer = small_run()
    feed(optimizer, 3)
    keys = set(optimizer.state_dict()["param_groups"][0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.state_dict()["param_groups"][0]) == keys
    optimizer.step()
    assert set(optimizer.param_groups[0]) == keys


# ----------------------------------------------------------------------------- G: ambient settings


def run_within(
    base: str,
    dtype: torch.dtype,
    before: Callable[[], Any],
    predictors: tuple[str, ...],
    **options: Any,
) -> list[Tensor]:
    """A run whose optimizer is made, stepped and read within the ambient settings."""
    gradients = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(14)]
    found = []
    for predictor in predictors:
        params = [nn.Parameter(torch.ones(4, 3, dtype=dtype, device=DEVICE)) for _ in range(2)]
        with before():
            optimizer = HybridOptimizer(
                params, LR, betas=(0.97, 0.993), base=base, max_grad_norm=0.7, ns_dtype="float32",
                hybrid=short_config(predictor=predictor), **options,
            )  # fmt: skip
            for gradient in gradients[: {"none": 2, "secant": 14}.get(predictor, 8)]:
                for param in params:
                    param.grad = gradient.to(param)
                optimizer.observe_loss(float(gradient.square().sum()))
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.observe_loss(2.34567)
            optimizer.step()
            confidence = optimizer.stats().confidence
        found += [*weights(optimizer), torch.tensor(confidence, dtype=torch.float64)]
    return found


@contextlib.contextmanager
def default(value: Any) -> Iterator[None]:
    """A default device or dtype for a while."""
    kind = "dtype" if isinstance(value, torch.dtype) else "device"
    getattr(torch, f"set_default_{kind}")(value)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


AMBIENT: dict[str, Callable[[], Any]] = {
    "meta": lambda: default("meta"),
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "autocast": lambda: torch.autocast(DEVICE.type, torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("setting", AMBIENT)
def test_ambient_settings_change_no_bit(setting: str, base: str, dtype: torch.dtype) -> None:
    predictors = ("slow_ema", "linear", *(("auto", "secant") if base == "adamw" else ()))
    plain = run_within(base, dtype, contextlib.nullcontext, predictors)
    assert_same_weights(run_within(base, dtype, AMBIENT[setting], predictors), plain)


def test_ambient_settings_change_no_bit_of_muon_in_triton() -> None:
    rest = {"predictors": ("none",), "backend": "triton"}
    plain = run_within("muon", torch.float32, contextlib.nullcontext, **rest)
    assert_same_weights(run_within("muon", torch.float32, AMBIENT["bfloat16"], **rest), plain)
