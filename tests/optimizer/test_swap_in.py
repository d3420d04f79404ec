"""What people do to weights between two steps: move them, write them, freeze, add, swap them.

Whoever writes is obeyed, and no prediction or rollback brings the old values back (promises 10 and
11). The letters are those of the kinds in which it once failed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    PRECISIONS,
    assert_same_weights,
    feed,
    same_bits,
    short_config,
    small_run,
    to_correct,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

Params = list[nn.Parameter]
Write = Callable[[Params], Any]
LR = 1e-2
NONE = HybridConfig(predictor="none")
STORED = pytest.mark.parametrize("precision", PRECISIONS)
DRIVES = pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])
VERDICTS = pytest.mark.parametrize("scale", [1.0, 1e4], ids=["accepted", "rejected"])


def assert_near(now: Tensor, before: Tensor, steps: float = 1) -> None:
    """At most so many steps of the base rule, and rounding, lie between the two."""
    size = before.detach().abs()
    limit = 4 * LR * steps * (1 + size) + 2 * torch.finfo(before.dtype).eps * size
    assert bool(((now - before).abs() <= limit).all()), f"{before} became {now}"


def set_data(change: Callable[[Tensor], Tensor]) -> Write:
    def write(params: Params) -> None:
        for param in params:
            param.data = change(param.data)

    return write


def first(change: Callable[[Tensor], Any]) -> Write:
    """Changes the first parameter in place, and in a way that the version counter sees."""
    return lambda params: torch.no_grad()(change)(params[0])


def first_data(change: Callable[[Tensor], Any]) -> Write:
    """The same through ``.data``, which no counter sees."""
    return lambda params: change(params[0].data)


# ------------------------------------------------------------------------- A: memory that moved


def swap_tensors(params: Params) -> None:
    for param in params:
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))


def round_trip(params: Params) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params).clone(), params)


def average_in_and_out(params: Params) -> None:
    """Average weights are evaluated in place of the trained ones, which come back by a copy."""
    for param in params:
        kept = param.detach().clone()
        param.data.copy_(0.5 * kept)
        param.data.copy_(kept)


def perturb_by_pointer(params: Params) -> None:
    """As sharpness-aware minimisation does."""
    kept = [param.data.clone() for param in params]
    set_data(lambda data: data + 1)(params)
    for param, values in zip(params, kept):
        param.data = values


def load_own_weights(params: Params) -> None:
    module = nn.ParameterList(params)
    module.load_state_dict(copy.deepcopy(module.state_dict()))


SAME_VALUES: dict[str, Write] = {
    "clone": set_data(torch.clone),
    "converted": set_data(lambda data: data.double().to(data.dtype)),
    "vector": round_trip,
    "average": average_in_and_out,
    "pointer": perturb_by_pointer,
    "swap_tensors": swap_tensors,
    "load_state_dict": load_own_weights,
}


@DRIVES
@STORED
@pytest.mark.parametrize("write", SAME_VALUES)
def test_the_same_values_change_no_bit_of_a_run(write: str, precision: str, inline: bool) -> None:
    """Before every step, so in every phase, and at predicted points."""
    runs = []
    for written in (False, True):
        _, optimizer = small_run(precision, inline)
        phases = []
        for step in range(16):
            if written:
                SAME_VALUES[write](optimizer.param_groups[0]["params"])
            phases += feed(optimizer, seed=step)
        runs.append((phases, weights(optimizer), optimizer.stats()))
    assert runs[0][0] == runs[1][0]
    assert Phase.CORRECT in runs[0][0]
    assert_same_weights(runs[0][1], runs[1][1])
    assert (runs[0][2].rollbacks, runs[0][2].horizon) == (runs[1][2].rollbacks, runs[1][2].horizon)


def exchange(params: Params) -> None:
    params[0].data, params[1].data = params[1].data, params[0].data


MOVES: dict[str, Write] = {
    "clone": set_data(torch.clone),
    "exchange": exchange,
    "transposed": set_data(lambda data: data.t().contiguous().t()),
    "shifted": set_data(lambda data: torch.cat([data.flatten(), data.flatten()])[1:13].view(4, 3)),
    "gaps": set_data(lambda data: torch.stack([data, data], -1)[..., 0]),
}


@pytest.mark.parametrize("base", ["AdamW", "Muon"])
@pytest.mark.parametrize("move", MOVES)
def test_weights_elsewhere_in_memory_train_as_with_torch(move: str, base: str) -> None:
    if not hasattr(torch.optim, base):
        pytest.skip(f"this torch has no {base}")
    muon = {"ns_dtype": "bfloat16", "adjust_lr_fn": "original"} if base == "Muon" else {}
    ours, optimizer = small_run(hybrid=NONE, base=base.lower(), weight_decay=0.1, **muon)
    theirs, _ = small_run()
    reference = getattr(torch.optim, base)(theirs, lr=LR, weight_decay=0.1)
    for step in range(8):
        for params, other in ((ours, optimizer), (theirs, reference)):
            if step in (1, 5):
                MOVES[move](params)
            feed(other, seed=step)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [Tensor.double, Tensor.bfloat16, lambda data: data[:2]], ids=["fp64", "bf16", "rows"]
)
def test_another_dtype_or_shape_trains_or_raises(change: Callable[[Tensor], Tensor]) -> None:
    """AdamW does one or the other; weights that stand still in silence are the error."""
    params, optimizer = small_run()
    feed(optimizer, 3)
    set_data(change)(params)
    before = weights(optimizer)
    try:
        feed(optimizer, 30)
    except (RuntimeError, ValueError, TypeError):
        return
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))


# -------------------------------------------------------- B: what enters or leaves in mid-stretch


def enter_by_group(optimizer: HybridOptimizer) -> nn.Parameter:
    param = nn.Parameter(torch.full((4, 3), 5.0))
    optimizer.add_param_group({"params": [param]})
    return param


def enter_by_unfreezing(optimizer: HybridOptimizer) -> nn.Parameter:
    param: nn.Parameter = optimizer.param_groups[0]["params"][2]
    return param.requires_grad_(True)


def enter_by_replacement(optimizer: HybridOptimizer) -> nn.Parameter:
    """A point cloud that grows: a longer tensor takes a parameter's place and state."""
    params = optimizer.param_groups[0]["params"]
    entry = optimizer.state.pop(params[1])
    grown = nn.Parameter(torch.cat([params[1].detach(), torch.full((4, 3), 5.0)]))
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.shape == params[1].shape:
            entry[key] = torch.cat([value, torch.zeros_like(value)])
    params[1], optimizer.state[grown] = grown, entry
    return grown


def enter_by_adapter(optimizer: HybridOptimizer) -> nn.Parameter:
    """One adapter is switched off, another on."""
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    return enter_by_unfreezing(optimizer)


@DRIVES
@VERDICTS
@pytest.mark.parametrize(
    "enter", [enter_by_group, enter_by_unfreezing, enter_by_replacement, enter_by_adapter]
)
def test_what_enters_in_mid_stretch_is_not_rolled_back(
    enter: Callable[..., nn.Parameter], scale: float, inline: bool
) -> None:
    params, optimizer = small_run(inline=inline, count=3)
    params[2].requires_grad_(False).fill_(5.0)
    to_correct(optimizer)
    param = enter(optimizer)
    before = param.detach().clone()
    feed(optimizer, scale=scale, seed=99)
    # Inline, a prediction may follow its first step.
    assert_near(param.detach(), before, 2)


@STORED
@VERDICTS
@pytest.mark.parametrize("written", [False, True], ids=["left", "written"])
def test_what_is_frozen_in_mid_stretch_has_verified_or_written_values(
    written: bool, scale: float, precision: str
) -> None:
    params, optimizer = small_run(precision, inline=False)
    expected = to_correct(optimizer)[0]
    assert not torch.equal(params[0], expected)
    params[0].requires_grad_(False)
    if written:
        params[0].data.fill_(3.0)
        expected = torch.full_like(expected, 3.0)
    feed(optimizer, 6, scale=scale, seed=99)
    assert same_bits(params[0].detach(), expected)


# ------------------------------------------------------------------ C, D: weights written by others


def load_other_weights(params: Params) -> None:
    nn.ParameterList(params[:1]).load_state_dict({"0": torch.full((4, 3), 7.0)})


def step_with_another(params: Params) -> None:
    """A second optimizer that shares the parameter."""
    params[0].grad = torch.ones_like(params[0])
    torch.optim.SGD(params[:1], lr=3.0).step()


WRITES: dict[str, Write] = {
    "fill_": first(lambda param: param.fill_(7.0)),
    "row": first(lambda param: param[1].fill_(-6.0)),
    "lookahead": first(lambda param: param.lerp_(torch.full_like(param, -4.0), 0.5)),
    "load_state_dict": load_other_weights,
    "shared": step_with_another,
    "data.fill_": first_data(lambda data: data.fill_(7.0)),
    "data.clamp_": first_data(lambda data: data.clamp_(-0.25, 0.25)),
    "data.copy_": first_data(lambda data: data.copy_(-3 * data)),
    "data.zero_": first_data(torch.Tensor.zero_),
    "data.row": first_data(lambda data: data[1].fill_(5.0)),
    "data=": lambda params: setattr(params[0], "data", torch.full_like(params[0], 7.0)),
}


@DRIVES
@STORED
@VERDICTS
@pytest.mark.parametrize("write", WRITES)
def test_who_writes_at_a_predicted_point_is_obeyed(
    write: str, scale: float, precision: str, inline: bool
) -> None:
    """The written weights take the base rule's step, the others stay or go back to verified ones;
    the stretch ends, and the predictor is not blamed."""
    params, optimizer = small_run(precision, inline)
    verified = to_correct(optimizer)[1]
    stats = optimizer.stats()
    WRITES[write](params)
    written, other = (param.detach().clone() for param in params)
    feed(optimizer, scale=scale, seed=99)
    assert_near(params[0].detach(), written)
    assert optimizer.phase is Phase.FULL
    if scale == 1:
        after = optimizer.stats()
        assert (after.rollbacks, after.horizon) == (stats.rollbacks, stats.horizon)
    if not inline:
        to_other, to_verified = (params[1] - other).abs(), (params[1] - verified).abs()
        nearest = torch.where(to_other < to_verified, other, verified)
        assert_near(params[1].detach(), nearest)
    for step in range(8):
        before = params[0].detach().clone()
        feed(optimizer, seed=step)
        assert_near(params[0].detach(), before, 8)


@pytest.mark.parametrize(
    ("predictor", "inline"), [("none", True), ("slow_ema", True), ("slow_ema", False)]
)
@STORED
@pytest.mark.parametrize("write", WRITES)
def test_who_writes_in_any_phase_is_obeyed(
    write: str, predictor: str, precision: str, inline: bool
) -> None:
    for stop in (0, 1, 2, 3, 4):
        config = short_config(predictor=predictor, inline=inline)
        params, optimizer = small_run(precision, hybrid=config)
        feed(optimizer, stop)
        WRITES[write](params)
        for step in range(2):
            before = params[0].detach().clone()
            feed(optimizer, seed=step + stop)
            assert_near(params[0].detach(), before, 4)


@pytest.mark.parametrize("write", ["row", "data.row"])
@pytest.mark.parametrize("precision", ["bf16", "split"])
def test_masters_of_elements_nobody_wrote_keep_their_bits(precision: str, write: str) -> None:
    """At this rate a BF16 weight stands still for many steps while its master moves."""
    runs = []
    for written in (False, True):
        params, optimizer = small_run(precision, lr=2e-4, hybrid=NONE)
        for step in range(60):
            if written and step == 35:
                WRITES[write](params)
            feed(optimizer, seed=step)
        runs.append(params[0].detach().clone())
    assert same_bits(runs[0][[0, 2, 3]], runs[1][[0, 2, 3]])
    assert not torch.equal(*runs)


# --------------------------------------------------------- E: what AdamW leaves alone is left alone

PREDICTORS = pytest.mark.parametrize("predictor", ["slow_ema", "linear"])


def run_branches(dtype: torch.dtype, base: str, predictor: str) -> list[tuple[Tensor, ...]]:
    """An embedding whose last rows never occur, a layer that is unused after a while, one that
    never is used; as they are after 25 and after 60 steps."""
    torch.manual_seed(0)
    modules = nn.Embedding(8, 3), nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    table, used, for_a_while, never = (module.to(dtype) for module in modules)
    params = [p for module in (table, used, for_a_while, never) for p in module.parameters()]
    optimizer = HybridOptimizer(params, LR, base=base, hybrid=short_config(predictor=predictor))
    seen = []
    for step in range(60):
        optimizer.zero_grad()
        hidden = table(torch.arange(5))
        layers = used(hidden) + (for_a_while(hidden) if step < 20 else 0)
        layers.square().mean().backward()
        optimizer.step()
        if step in (25, 59):
            still = (table.weight[5:], for_a_while.weight, never.weight)
            seen.append(tuple(weight.detach().clone() for weight in still))
    return seen


@PREDICTORS
@pytest.mark.parametrize("base", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_without_a_gradient_are_moved_by_no_prediction(
    dtype: torch.dtype, base: str, predictor: str
) -> None:
    """The unused rows decay as with the base rule alone, the unused layers stand still."""
    early, late = run_branches(dtype, base, predictor)
    assert_same_weights(list(early[1:]), list(late[1:]))
    plain = run_branches(dtype, base, "none")
    assert_same_weights([early[0], late[0], late[2]], [plain[0][0], plain[1][0], plain[1][2]])


@PREDICTORS
@DRIVES
@pytest.mark.parametrize("base", ["adamw", "lion", "muon"])
def test_a_group_at_learning_rate_zero_stands_still(
    base: str, predictor: str, inline: bool
) -> None:
    """From the first step on, or from any Full step on, when it has moved before."""
    config = short_config(predictor=predictor, inline=inline, full_steps=3)
    for start in range(9):
        _, optimizer = small_run(base=base, hybrid=config)
        still = nn.Parameter(torch.ones(4, 3))
        optimizer.add_param_group({"params": [still]})
        feed(optimizer, start)
        while optimizer.phase not in (Phase.WARMUP, Phase.FULL):
            feed(optimizer)
        optimizer.param_groups[1]["lr"] = 0.0
        before = still.detach().clone()
        feed(optimizer, 12)
        assert same_bits(still.detach(), before)
