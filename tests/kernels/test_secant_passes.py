"""The passes of a quasi-Newton move, and the two loops that its coefficients stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import (
    BACKENDS,
    HISTORY,
    KERNELS,
    PLAIN,
    Checked,
    assert_leaves_alone,
    pairs_of,
    solution,
)  # fmt: skip
from kernel_memory import assert_near, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import ONE, THREE, fewer, plain
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, PART_COLUMN
from triton_hybrid.kernels.scalars import HYPER
from triton_hybrid.kernels.secant import products_size
from triton_hybrid.kernels.trial import MOST_DECAY, TRIAL, judge, new_trial, solve


@fewer()
@given(make=problems(max_size=3))
def test_products_match_the_fp64_oracle(make: Make) -> None:
    problem, twin = make().confident(), make().confident()
    oracle, before = problem.promoted(), problem.snapshot()
    expected = PLAIN.products(oracle, HISTORY)
    for actual, backend in ((problem, KERNELS), (twin, PLAIN)):
        found = backend.products(actual, HISTORY)
        assert_near(found, expected, "products", rtol=2e-5, atol=2e-6 * float(expected.abs().max()))
        actual.assert_unchanged(before)


@BACKENDS
@pytest.mark.parametrize(("slot", "pairs"), [(0, 3), (2, 3), (2, 2), (0, 0)])
def test_products_are_those_of_their_definition(backend: Checked, slot: int, pairs: int) -> None:
    """A set of one, written down; with fewer than three pairs the metric is the rule's."""
    problem = Problem(plain((70,)), tiling=THREE).confident()
    lr, eps, decay, beta1, beta2 = (
        float(problem.scalars.hyperparameters[0, HYPER[name]])
        for name in ("lr", "eps", "weight_decay", "beta1", "beta2")
    )
    for name in ("last_gradient", *(f"change_{i}" for i in range(HISTORY))):
        problem.rows[name][0][:9] = 0.0
    row = {name: tensors[0].double() for name, tensors in problem.rows.items()}
    step = float(problem.tensors.steps[0])
    second = row["exp_avg_sq"] / (1 - beta2**step)
    remembered = gradients_of(row, slot)
    assert not remembered[:, :9].any(), "for which the rule's stands"
    if pairs == 3:
        second[9:] = remembered[:, 9:].square().mean(0)
    metric = lr / (second.sqrt() + eps)
    m, g = row["exp_avg"] / (1 - beta1**step), row["last_gradient"]
    moves = torch.stack([row[f"move_{i}"] for i in range(HISTORY)])
    changes = torch.stack([row[f"change_{i}"] for i in range(HISTORY)])
    right = torch.cat([changes, g.unsqueeze(0)]).T
    expected = [(moves @ right).flatten(), (changes * metric @ right).flatten()]
    expected += [(moves.square() / metric).sum(1), (metric * g * g).sum().view(1)]
    expected += [(metric * m * m).sum().view(1), (lr * decay * g * row["weight"]).sum().view(1)]
    assert len(torch.cat(expected)) == products_size(HISTORY)
    trial = pairs_of(problem, slot, pairs)
    found = backend.products(problem, HISTORY, trial)
    assert_near(found, torch.cat(expected), "products", 1e-5, 1e-6)
    problem.prediction[:, PART_COLUMN.value] = 0.0
    assert not backend.products(problem, HISTORY).any(), "who takes no part adds nothing"


def gradients_of(row: dict[str, Tensor], slot: int) -> Tensor:
    """Those that `HISTORY` pairs remember, newest first, the next pair in a slot."""
    found = [row["last_gradient"]]
    for back in range(HISTORY):
        found.append(found[-1] - row[f"change_{(slot - 1 - back) % HISTORY}"])
    return torch.stack(found)


@fewer()
@given(make=problems(max_size=3), seed=st.integers(0, 9), pairs=st.integers(2, 3))
def test_the_move_matches_the_fp64_oracle(make: Make, seed: int, pairs: int) -> None:
    problem, twin = make().confident(), make().confident()
    oracle, before = problem.promoted(), problem.snapshot()
    trial = pairs_of(problem, seed % HISTORY, pairs)
    PLAIN.move(oracle, solution(seed), HISTORY, trial)
    for actual, backend in ((problem, KERNELS), (twin, PLAIN)):
        backend.move(actual, solution(seed), HISTORY, trial)
        actual.assert_near(oracle, ["weight"], rtol=1e-5, atol=2e-6)
        for column, name in enumerate(("slope", "square")):
            expected = oracle.sums[:, column]
            slack = 1e-5 * float(oracle.sums[:, 1].abs().max() + expected.abs().max()) + 1e-7
            assert_near(actual.sums[:, column], expected, name, 1e-4, slack)
        actual.assert_unchanged(before, but=("weight",))


@BACKENDS
def test_a_move_leaves_alone_what_takes_no_part_and_what_never_had_a_gradient(
    backend: Checked,
) -> None:
    problem = assert_leaves_alone(lambda its, order: backend.move(its, order, HISTORY))
    assert not problem.sums.any()


@BACKENDS
def test_the_move_is_that_of_its_definition(backend: Checked) -> None:
    """In the metric of the gradients that the pairs remember, from any slot."""
    for slot in range(HISTORY):
        problem = Problem(plain((70,))).confident()
        row = {name: tensors[0].double() for name, tensors in problem.rows.items()}
        lr, eps, decay = (
            float(problem.scalars.hyperparameters[0, HYPER[name]])
            for name in ("lr", "eps", "weight_decay")
        )
        metric = lr / (gradients_of(row, slot).square().mean(0).sqrt() + eps)
        _, gamma, share, *rest = solution(3)
        alpha, delta = torch.stack(rest).split(HISTORY)
        changes, moves = (
            torch.stack([row[f"{kind}_{i}"] for i in range(HISTORY)]) for kind in ("change", "move")
        )
        moved = -gamma * metric * (row["last_gradient"] - alpha @ changes) - delta @ moves
        moved -= share * lr * decay * row["weight"]
        backend.move(problem, solution(3), HISTORY, pairs_of(problem, slot))
        found = problem.values("weight")[0]
        assert_near(found.double(), row["weight"] + moved, "weight", 1e-5, 1e-6)
        square = float((moved * moved / metric).sum())
        assert problem.sums[0, 1].item() == pytest.approx(square, rel=1e-4)


@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_result_is_seen(backend: Checked, value: float) -> None:
    problem = Problem(plain((300,), (70,))).confident()
    problem.rows["change_1"][0][299] = value
    backend.move(problem, solution(2), HISTORY)
    assert (problem.sums[:, 2] > 0).tolist() == [True, False]


ORDERS = ((1.0, 1.0, 1.0, 2.0), (1.0, 0.0, 0.3, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0))


@fewer()
@given(make=problems(max_size=3), order=st.sampled_from(ORDERS))
def test_settling_does_what_is_ordered(make: Make, order: tuple[float, ...]) -> None:
    pair, restart, fraction, slot = order
    orders = torch.tensor(order, dtype=torch.float64)
    problem, twin = make().confident(), make().confident()
    before = problem.snapshot()
    for actual, backend in ((problem, KERNELS), (twin, PLAIN)):
        backend.settle(actual, orders, HISTORY)
        written = [f"{kind}_{int(slot)}" for kind in ("move", "change")] if pair else []
        written += ["snapshot", "last_gradient"] if restart else []
        actual.assert_unchanged(before, but=(*written, *["weight"] * (fraction != 1.0)))
    problem.assert_near(twin, ["weight", "snapshot", *problem.state], rtol=1e-5, atol=1e-6)
    wide = problem.precision.wide
    for index, spec in enumerate(problem.specs):
        weight, origin = before["weight"][index], before["snapshot"][index]
        if pair:
            moved = (weight - origin) * spec.present
            assert_same_bits(problem.rows[f"move_{int(slot)}"][index], moved, "move")
            here = before["grad"][index].to(wide) * sign(problem, index)
            change = (here - before["last_gradient"][index]) * spec.present
            assert_near(problem.rows[f"change_{int(slot)}"][index], change, "change", 1e-6, 1e-7)
        if restart:
            assert_same_bits(problem.rows["snapshot"][index], weight, "snapshot")
        if fraction == 0.0:
            rounded = origin.to(problem.precision.param)
            assert_same_bits(problem.rows["param"][index], rounded, "rolled back")


def sign(problem: Problem, index: int) -> float:
    """-1 for a tensor that is maximised, over the loss scale."""
    row = problem.scalars.hyperparameters[problem.tensors.group[index].long()]
    return float(row[HYPER["sign"]] / problem.ledger[INDEX["loss_scale"]])


@given(
    pairs=st.integers(0, 5), slot=st.integers(0, 4), bad=st.integers(-1, 4), seed=st.integers(0, 99)
)
def test_the_coefficients_are_those_of_the_two_loops(
    pairs: int, slot: int, bad: int, seed: int
) -> None:
    """For any place of the newest pair in the ring, and with a pair that must be left out."""
    n, history = 12, 5
    generator = torch.Generator().manual_seed(seed)
    wide = {"dtype": torch.float64, "generator": generator}
    root = torch.randn(n, n, **wide)  # type: ignore[call-overload]
    hessian = root @ root.T + torch.eye(n, dtype=torch.float64)
    s = torch.randn(history, n, **wide)  # type: ignore[call-overload]
    y, g = s @ hessian, torch.randn(n, **wide)  # type: ignore[call-overload]
    if bad >= 0:
        y[bad] = -y[bad]
    metric = torch.rand(n, **wide) + 0.1  # type: ignore[call-overload]
    right = torch.cat([y, g.unsqueeze(0)]).T
    parts = [(s @ right).flatten(), (y * metric @ right).flatten(), (s * s / metric).sum(1)]
    parts += [torch.tensor([float((metric * g * g).sum()), 1.0, -0.5], dtype=torch.float64)]
    trial = new_trial(torch.device("cpu"), {"slot": slot, "pairs": pairs, "ready": 1.0})
    ready, gamma, share, *rest = solve(torch.cat(parts), trial, history)
    alpha, delta = torch.stack(rest).split(history)
    found = -gamma * metric * (g - alpha @ y) - delta @ s

    newest_first = [(slot - 1 - k) % history for k in range(pairs)]
    kept = [i for i in newest_first if i != bad]
    q, steps, first = g.clone(), {}, 1.0
    for i in kept:
        steps[i] = s[i].dot(q) / s[i].dot(y[i])
        q -= steps[i] * y[i]
    if kept:
        move, change = s[kept[0]], y[kept[0]]
        first = math.sqrt(move.dot(move / metric) / (change * metric).dot(change))
    r = first * metric * q
    for i in reversed(kept):
        r += s[i] * (steps[i] - y[i].dot(r) / s[i].dot(y[i]))
    torch.testing.assert_close(found, -r, rtol=1e-9, atol=1e-9)
    assert ready == 1.0
    assert found.dot(g) < 0
    wanted = min(1.0, MOST_DECAY * float(-found.dot(g)) / 0.5)
    assert share == pytest.approx(wanted, rel=1e-6), "of its slope, against which the decay is 0.5"


ARMIJO = [
    # loss before and after, slope before and after, shortened so far: decision, fraction
    (1.0, 0.9, -0.2, 0.0, 0, 1, 1.0),
    (1.0, 0.99999, -0.2, 0.0, 0, 4, 0.5),
    (1.0, 1.2, -0.2, 0.6, 0, 4, 0.25),
    (1.0, 99.0, -0.2, 0.6, 0, 4, 0.1),
    (1.0, math.inf, -0.2, 0.6, 2, 4, 0.1),
    (1.0, 1.2, -0.2, 0.6, 3, 2, 0.0),
    (1.0, 1.0 + 1e-7, -1e-5, -1e-6, 0, 1, 1.0),  # rounding: the slopes say that it fell
    (1.0, 1.0 + 1e-7, -1e-5, 2e-5, 0, 4, 0.5 / 1.01),
    (math.nan, 0.9, -0.2, 0.1, 0, 1, 1.0),  # no loss: the trapezoid of the slopes
    (math.nan, 0.9, -0.2, 0.6, 0, 4, 0.25),
]


@pytest.mark.parametrize(("base", "loss", "slope", "after", "tries", "decision", "share"), ARMIJO)
def test_sufficient_decrease(
    base: float, loss: float, slope: float, after: float, tries: int, decision: int, share: float
) -> None:
    problem = Problem(plain((3,))).note(moved=1.0, loss=loss, horizon=0.8)
    entries = {"loss": base, "slope": slope, "shortened": tries, "based": 1.0, "pairs": 3}
    trial = new_trial(problem.ledger.device, entries)
    sums = torch.tensor([[after, 1.0, 0.0]], dtype=torch.float64)
    orders = judge(problem.ledger, trial, sums, last=True, cooldown=5.0, history=4)
    known = dict(zip(TRIAL, trial.tolist()))
    assert problem.ledger[INDEX["decision"]] == decision
    assert orders[2].item() == pytest.approx(share)
    assert problem.ledger[INDEX["horizon"]] == pytest.approx(0.96 if decision == 1 else 0.4)
    assert known["ready"] == (decision == 1)
    assert known["slope"] == pytest.approx(share * slope if decision == 4 else slope)
    assert problem.ledger[INDEX["hold"]] == (decision != 1)
    assert known["pairs"] == {1: 4, 2: 0, 4: 3}[decision], "of a move that lasts"
    assert orders[0] == (decision == 1)
    assert problem.ledger[INDEX["cooldown"]] == (5.0 if decision == 2 else 0.0)


def test_one_nonfinite_gradient_decides_nothing_and_two_shorten() -> None:
    problem = Problem(plain((3,)), tiling=ONE).note(moved=1.0, loss=0.5)
    entries = {"loss": 1.0, "slope": -0.2, "based": 1.0, "pairs": 3}
    trial = new_trial(problem.ledger.device, entries)
    sums = torch.tensor([[math.nan, math.nan, 1.0]], dtype=torch.float64)
    for decision, fraction in ((0.0, 1.0), (4.0, 0.1)):
        orders = judge(problem.ledger, trial, sums, last=True, cooldown=5.0, history=4)
        assert problem.ledger[INDEX["decision"]] == decision
        assert orders.tolist() == [0.0, 0.0, fraction, 0.0]
        assert trial[TRIAL.index("pairs")] == 3
