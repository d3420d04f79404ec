"""The quasi-Newton predictor: what it gains, what judges its moves, what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import assert_same_weights, weights

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

SECANT = {"predictor": "secant", "warmup_steps": 3, "full_steps": 3, "history": 4}


def quadratic(
    dtype: torch.dtype = torch.float64,
) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Two tensors under an ill-conditioned bowl, and its loss."""
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype))
        for shape in ((4, 3), (8,))
    ]
    scales = torch.logspace(-2, 1, 20, dtype=torch.float64, device=DEVICE)

    def loss() -> Tensor:
        flat = torch.cat([param.flatten().double() for param in params])
        return 0.5 * (scales * (flat - 0.5) ** 2).sum() + 0.1 * (flat.diff() ** 4).sum()

    return params, loss


def made(params: Any, *, lr: float = 1e-2, **options: Any) -> HybridOptimizer:
    """The optimizer with short phases; options of HybridConfig beside its own."""
    changes = {key: options.pop(key) for key in ("inline", "history", "offload") if key in options}
    hybrid = HybridConfig(**{**SECANT, **changes})
    return HybridOptimizer(params, lr=lr, hybrid=hybrid, **{"weight_decay": 0.0, **options})


def run(
    optimizer: HybridOptimizer, loss: Callable[[], Tensor], gradients: int, observe: bool = True
) -> list[float]:
    """Trains for so many gradients; returns the losses."""
    losses: list[float] = []
    while len(losses) < gradients:
        if optimizer.needs_backward:
            value = loss()
            value.backward()
            losses.append(value.item())
            if observe:
                optimizer.observe_loss(value.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("observe", [True, False])
def test_it_solves_what_adamw_only_approaches(observe: bool) -> None:
    """Also by the slopes alone, where nobody tells the loss."""
    params, loss = quadratic()
    losses = run(made(params, history=10), loss, 150, observe)
    others, other_loss = quadratic()
    adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        adamw.zero_grad()
        other_loss().backward()
        adamw.step()
    best = 1e-3  # of the bowl and its quartic, far below which AdamW does not come
    assert losses[-1] < losses[60] < losses[20]
    assert losses[-1] - min(losses) <= 1e-9
    assert other_loss().item() - losses[-1] > best


def test_both_drives_and_a_closure_take_the_same_steps() -> None:
    found = []
    for drive in ("inline", "stepped", "closure"):
        params, loss = quadratic()
        optimizer = made(params, inline=drive != "stepped", weight_decay=0.1)

        def closure(optimizer: HybridOptimizer = optimizer, loss: Any = loss) -> Tensor:
            optimizer.zero_grad()
            value: Tensor = loss()
            value.backward()
            return value.detach()

        if drive == "closure":
            for _ in range(40):
                optimizer.step(closure)
        else:
            run(optimizer, loss, 40)
            while not optimizer.needs_backward:
                optimizer.step()
        found.append(weights(optimizer))
    assert_same_weights(found[0], found[1])
    assert_same_weights(found[0], found[2])


def at_correct(**options: Any) -> tuple[HybridOptimizer, Callable[[], Tensor], list[Tensor]]:
    """A stepped run with a move on trial, and the weights before it."""
    params, loss = quadratic()
    optimizer = made(params, inline=False, **options)
    run(optimizer, loss, 12)
    while optimizer.phase is not Phase.PREDICT:
        run(optimizer, loss, 1)
    before = weights(optimizer)
    optimizer.step()
    assert optimizer.phase is Phase.CORRECT
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))
    return optimizer, loss, before


def reject(optimizer: HybridOptimizer, loss: Callable[[], Tensor], worse: float) -> None:
    """Judges the move on trial by a loss that is higher than the true one."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.observe_loss(loss().detach() + worse)
    optimizer.step()
    optimizer.zero_grad()


def test_a_rejected_move_is_shortened_three_times_and_then_rolled_back_bit_for_bit() -> None:
    optimizer, loss, before = at_correct()
    state = {name: value.clone() for name, value in optimizer.state[first(optimizer)].items()}
    start = [a.double() for a in before]
    length = math.inf
    for attempt in range(3):
        reject(optimizer, loss, 1e3)
        assert optimizer.phase is Phase.CORRECT, f"attempt {attempt}"
        moved = math.sqrt(
            sum(float((a - b).square().sum()) for a, b in zip(weights(optimizer), start))
        )
        assert 0 < moved <= 0.5 * length
        length = moved
    reject(optimizer, loss, 1e3)
    assert_same_weights(weights(optimizer), before)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[first(optimizer)][name], state[name])
    stats = optimizer.stats()
    assert (optimizer.phase, stats.rollbacks, stats.divergences["loss"]) == (Phase.FULL, 1, 1)
    assert stats.horizon < 1.0
    run(optimizer, loss, 3)
    assert optimizer.phase is Phase.PREDICT, "after a Full phase of full_steps"


def first(optimizer: HybridOptimizer) -> Any:
    return optimizer.param_groups[0]["params"][0]


def test_the_shorter_move_is_at_the_minimum_of_the_parabola() -> None:
    optimizer, loss, before = at_correct()
    here = weights(optimizer)
    slope = optimizer._engine.predictor._trial[4].item()  # type: ignore[union-attr]
    base = optimizer._engine.predictor._trial[3].item()  # type: ignore[union-attr]
    worse = base - slope - loss().item()  # the loss is up by as much as the slope promised it down
    reject(optimizer, loss, worse)
    for now, then, start in zip(weights(optimizer), here, before):
        torch.testing.assert_close(now, start + 0.25 * (then - start))


def test_weight_decay_maximize_and_groups() -> None:
    """The objective negated and maximised is the same run; the decay keeps pulling."""
    ends = []
    for maximize in (False, True):
        params, loss = quadratic()
        sign = -1.0 if maximize else 1.0
        groups = [{"params": params[:1], "lr": 2e-2}, {"params": params[1:], "weight_decay": 0.0}]
        optimizer = made(groups, weight_decay=1.0, maximize=maximize)
        run(optimizer, lambda loss=loss, sign=sign: sign * loss(), 30)  # type: ignore[misc]
        ends.append(weights(optimizer))
    assert_same_weights(*ends)
    params, loss = quadratic()
    run(made([{"params": params[:1], "lr": 2e-2}, {"params": params[1:]}]), loss, 30)
    assert not torch.equal(params[0], ends[0][0])


def test_clipping_and_loss_scales_leave_the_pairs_alone() -> None:
    """Both change what the moments see at most."""
    found = []
    for scale in (None, 1024.0):
        params, loss = quadratic()
        optimizer = made(params, loss_scale=scale, max_grad_norm=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            value = loss()
            (value if scale is None else optimizer.scale_loss(value)).backward()
            optimizer.observe_loss(value.detach())
            optimizer.step()
        found.append(weights(optimizer))
    assert_same_weights(*found)
    changes = optimizer.state[params[0]]["change_0"]
    assert changes.abs().max() > 0


def test_the_pairs_remember_the_gradients_of_the_places_that_were_kept() -> None:
    """The last one less the changes, newest first; a move that was shortened makes no pair."""
    params, loss = quadratic()
    optimizer, kept, shortened, most, renewed = made(params, history=4), [], 0, 0, 0
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.observe_loss(value.detach())
        assert params[0].grad is not None
        gradient = params[0].grad.clone()
        optimizer.step()
        trial = optimizer._engine.predictor.state()  # type: ignore[union-attr]
        if trial["shortened"] or not trial["based"]:
            shortened += trial["shortened"] > 0
            continue
        kept.append(gradient)
        state = optimizer.state[params[0]]
        found = state["last_gradient"].clone()
        left, right = state["left_basis"], state["right_basis"]
        for back in range(int(trial["pairs"])):
            found -= state[f"change_{int(trial['slot'] - 1 - back) % 4}"]
            seen = left @ found @ right.T if trial["turned"] else found
            torch.testing.assert_close(seen, kept[-2 - back], rtol=1e-9, atol=1e-12)
        most = max(most, int(trial["pairs"]))
        renewed += trial["turned"] == 1
    assert shortened >= 3
    assert most == 4
    assert renewed >= 3


def test_it_leaves_alone_what_adamw_leaves_alone() -> None:
    """No gradient since the last point, learning rate 0, elements without any gradient."""
    params, loss = quadratic()
    table = nn.Parameter(torch.ones(6, 2, dtype=torch.float64, device=DEVICE))
    still = nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    absent = nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    groups = [{"params": [*params, table, absent]}, {"params": [still], "lr": 0.0}]
    optimizer = made(groups)
    step = 0

    def objective() -> Tensor:
        nonlocal step
        step += 1
        value = loss() + (table[:3] ** 2).sum() + (still**2).sum()
        return value + (absent**2).sum() if step < 5 else value

    run(optimizer, objective, 5)
    kept = absent.detach().clone()
    run(optimizer, objective, 30)
    assert optimizer.stats().predicted_steps > 10
    assert torch.equal(absent, kept)
    assert torch.equal(still, torch.ones_like(still))
    assert torch.equal(table[3:], torch.ones_like(table[3:]))
    assert not torch.equal(table[:3], torch.ones_like(table[:3]))


def test_what_somebody_writes_to_a_weight_stands() -> None:
    optimizer, loss, before = at_correct()
    with torch.no_grad():
        first(optimizer).fill_(3.0)
    twin = weights(optimizer)
    reject(optimizer, loss, 1e3)
    assert torch.equal((first(optimizer) - 3.0).abs() < 0.5, torch.ones_like(first(optimizer)) > 0)
    assert not torch.equal(first(optimizer), before[0])
    assert twin[0].unique().tolist() == [3.0]
    losses = run(optimizer, loss, 60)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_pairs_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_hybrid.offload.COPY_ON_CPU", True)
    found = []
    for home in ("none", "cpu"):
        params, loss = quadratic(dtype)
        optimizer = made(params, offload=home)
        run(optimizer, loss, 30)
        found.append(weights(optimizer))
    assert_same_weights(*found)
    stats = optimizer.stats()
    assert stats.state_bytes_host > stats.state_bytes_device


def test_capturable_decides_alike_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's phases run as if all were accepted; the device knows better."""
    found = []
    for capturable in (False, True):
        params, loss = quadratic()
        optimizer = made(params, capturable=capturable, lr=0.5)
        if capturable:
            monkeypatch.setattr(HybridOptimizer, "_ask", None)
        run(optimizer, loss, 60)
        found.append(weights(optimizer))
        stats = optimizer.stats()
    assert stats.acceptance_rate > 0
    for left, right in zip(*found):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_a_rule_without_a_second_moment_is_refused() -> None:
    param = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = HybridOptimizer([param], base="lion", hybrid=HybridConfig(predictor="secant"))
    with pytest.raises(ValueError, match=r"base.* must be 'adamw'"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))


def test_state_is_two_rows_a_pair_two_more_and_bases_of_matrices() -> None:
    params, loss = quadratic(torch.float32)
    optimizer = made(params, history=5)
    run(optimizer, loss, 10)
    pairs = {f"{kind}_{slot}" for kind in ("move", "change") for slot in range(5)}
    for param in params:
        state = optimizer.state[param]
        rows = {name for name, value in state.items() if value.shape == param.shape}
        assert rows == {"exp_avg", "exp_avg_sq", "snapshot", "last_gradient", *pairs}
        shapes = {name: value.shape for name, value in state.items() if name.endswith("_basis")}
        squares = {"left_basis": (4, 4), "right_basis": (3, 3)} if param.dim() == 2 else {}
        assert shapes == squares


def turned(optimizer: HybridOptimizer) -> float:
    """One more than the pairs noted since the bases were renewed; 0: there are none."""
    assert optimizer._engine is not None
    return float(optimizer._engine.predictor.state()["turned"])


@pytest.mark.parametrize("gradients", [8, 14, 19, 26])
def test_a_checkpoint_between_two_renewals_goes_on_bit_for_bit(gradients: int) -> None:
    params, loss = quadratic()
    optimizer = made(params, weight_decay=0.1)
    run(optimizer, loss, gradients)
    assert 0 < turned(optimizer) <= 11
    twins, twin_loss = quadratic()
    with torch.no_grad():
        for twin, param in zip(twins, params):
            twin.copy_(param)
    other = made(twins, weight_decay=0.1)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, loss, 25)
    run(other, twin_loss, 25)
    assert_same_weights(weights(optimizer), weights(other))
    assert turned(optimizer) == turned(other) > 0
    for name in ("left_basis", "right_basis"):
        found, kept = (its.state[first(its)][name] for its in (other, optimizer))
        assert torch.equal(found, kept)
        assert not torch.equal(found, torch.eye(len(found)).to(found))


def test_bases_end_with_the_pairs() -> None:
    """After a rollback everything is kept as it comes, until there are enough pairs again."""
    optimizer, loss, _ = at_correct()
    run(optimizer, loss, 12)
    assert turned(optimizer) > 0
    while turned(optimizer):
        if optimizer.needs_backward:
            reject(optimizer, loss, 1e3)
        else:
            optimizer.step()
    loss().backward()
    gradient = first(optimizer).grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(optimizer.state[first(optimizer)]["last_gradient"], gradient)
    run(optimizer, loss, 12)
    assert turned(optimizer) > 0


def test_pairs_whose_bases_are_missing_are_dropped() -> None:
    """A parameter that joins later, or a checkpoint that lost them: it goes on with new ones."""
    params, loss = quadratic()
    optimizer = made(params)
    run(optimizer, loss, 20)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry.pop("left_basis", None)
    other = made(params)
    other.load_state_dict(saved)
    run(other, loss, 1)
    assert other._engine.predictor.state()["pairs"] <= 1  # type: ignore[union-attr]
    losses = run(other, loss, 30)
    assert losses[-1] < losses[0]
    late = nn.Parameter(torch.ones(3, 3, dtype=torch.float64, device=DEVICE))
    other.add_param_group({"params": [late]})
    losses = run(other, lambda: loss() + late.square().sum(), 40)
    assert losses[-1] < 0.1 * losses[0]
    assert other.state[late]["left_basis"].shape == (3, 3)
    assert turned(other) > 0


@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
def test_a_matrix_moves_alike_however_it_lies_in_memory(layout: str) -> None:
    found = []
    for changed in (False, True):
        params, loss = quadratic()
        start = params[0].detach()
        if changed and layout == "columns":
            start = start.T.contiguous().T
        elif changed and layout == "gaps":
            start = torch.stack([start, start], dim=-1)[..., 0]
        params[0].data = start
        optimizer = made(params, weight_decay=0.1)
        run(optimizer, loss, 30)
        assert turned(optimizer) > 0
        found.append(weights(optimizer))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_another_predictor_goes_on() -> None:
    """Rows that are not there are made; what the other one predicted is judged, or taken out."""
    params, loss = quadratic()
    kinds = ("secant", "slow_ema", "secant", "linear", "auto")
    optimizer: HybridOptimizer | None = None
    for kind in kinds:
        hybrid = HybridConfig(**{**SECANT, "predictor": kind, "confidence_threshold": 0.0})
        other = HybridOptimizer(params, lr=1e-2, hybrid=hybrid)
        if optimizer is not None:
            other.load_state_dict(optimizer.state_dict())
        optimizer = other
        losses = run(optimizer, loss, 15)
        assert losses[-1] < max(1.1 * losses[0], 0.05), kind  # from 48


@pytest.mark.parametrize("masters", ["auto", "split", "none"])
def test_sixteen_bits(masters: str) -> None:
    params, loss = quadratic(torch.bfloat16)
    optimizer = made(params, master_weights=masters, weight_decay=0.1)
    losses = run(optimizer, loss, 40)
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.stats().predicted_steps > 10
