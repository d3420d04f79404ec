"""Gradients that a step refuses or clips, and others that only look as if it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, Checked
from kernel_memory import assert_near
from kernel_problems import Problem, changed_entries, problems
from kernel_specs import FP16, PRECISIONS, Precision, Spec, fewer, plain, some
from triton_hybrid.kernels.ledger import read_ledger

from triton_hybrid.rules import RULES

EVERY_RULE = pytest.mark.parametrize("rule", RULES)


@BACKENDS
@EVERY_RULE
@fewer(5)
@given(
    data=st.data(),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    max_norm=st.sampled_from((None, 1.0)),
)
def test_a_nonfinite_gradient_changes_no_byte_but_its_counter(
    backend: Checked, rule: str, data: st.DataObject, value: float, max_norm: float | None
) -> None:
    problem = data.draw(problems(rule, absent=True, filled=True))()
    drawn = problem.specs
    candidates = [i for i, spec in enumerate(drawn) if spec.present and spec.numel]
    index = data.draw(st.sampled_from(candidates), label="tensor")
    element = data.draw(st.integers(0, drawn[index].numel - 1), label="element")
    grad = problem.rows["grad"][index]
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), grad.shape))
    grad[place] = value
    problem.set_gradients()
    problem.note(loss=3.0, norm=7.0, applied=5.0, cooldown=2.0, slow_count=9.0)
    before, ledger = problem.snapshot(), problem.ledger.clone()
    backend.step(problem, max_norm=max_norm)
    problem.assert_unchanged(before, but=problem.worked_out)
    after = read_ledger(problem.ledger)
    assert changed_entries(ledger, problem.ledger) == {"nonfinite", "skipped", "loss"}
    assert (after["nonfinite"], after["skipped"]) == (1, 1)

    grad[place] = 1.0
    problem.set_gradients()
    backend.step(problem, max_norm=max_norm)
    after = read_ledger(problem.ledger)
    assert (after["nonfinite"], after["skipped"], after["applied"]) == (0, 1, 6)
    assert problem.tensors.steps.tolist() == [spec.step + spec.present for spec in drawn]


@BACKENDS
@EVERY_RULE
def test_a_nonfinite_gradient_in_one_set_holds_every_set_back(backend: Checked, rule: str) -> None:
    half = Problem(some(rule=rule), rule=rule, precision=FP16)
    single = Problem(plain((70,), (5,)))
    single.rows["grad"][1][4] = math.nan
    half.share(single)
    before = half.snapshot(), single.snapshot()
    backend.step(half, single, max_norm=1.0)
    half.assert_unchanged(before[0], but=half.worked_out)
    single.assert_unchanged(before[1])
    assert read_ledger(half.ledger)["skipped"] == 1


@BACKENDS
@EVERY_RULE
@fewer(3)
@given(data=st.data())
def test_a_held_step_changes_no_byte_and_is_held_once(
    backend: Checked, rule: str, data: st.DataObject
) -> None:
    problem = data.draw(problems(rule, absent=True))()
    problem.note(hold=1.0, loss=1.0)
    before, ledger = problem.snapshot(), problem.ledger.clone()
    backend.step(problem)
    problem.assert_unchanged(before, but=problem.worked_out)
    assert changed_entries(ledger, problem.ledger) | {"norm"} == {"norm", "hold", "loss"}
    backend.step(problem)
    after = read_ledger(problem.ledger)
    assert (after["applied"], after["skipped"]) == (1, 0)


@BACKENDS
@EVERY_RULE
@pytest.mark.parametrize("specs", [plain((0, 4)), plain((3, 0), (0, 3)), some(rule="muon")])
def test_without_any_gradient_nothing_changes_but_the_steps(
    backend: Checked, rule: str, specs: list[Spec]
) -> None:
    """Of empty tensors, or because there is none; a missing one is no step."""
    specs = [replace(spec, present=not spec.numel) for spec in specs]
    problem = Problem(specs, rule=rule)
    before = problem.snapshot()
    backend.step(problem, max_norm=1.0)
    problem.assert_unchanged(before, but=("steps", *problem.worked_out))
    assert problem.tensors.steps.tolist() == [spec.step + spec.present for spec in specs]
    assert read_ledger(problem.ledger)["norm"] == 0


@BACKENDS
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_denormal_gradients_are_gradients(backend: Checked, precision: Precision) -> None:
    problem = Problem(plain((70,)), precision=precision)
    problem.rows["grad"][0].fill_(torch.finfo(precision.grad).smallest_normal / 4)
    assert (problem.rows["grad"][0] != 0).all(), "the denormal itself is there"
    backend.step(problem, max_norm=1.0)
    entries = read_ledger(problem.ledger)
    assert (entries["nonfinite"], entries["applied"]) == (0, 1)
    assert problem.values("weight")[0].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_finite_gradients_whose_square_overflows_are_applied(
    backend: Checked, max_norm: float | None
) -> None:
    """1e25 squared is no FP32 number: the norm is infinite, the gradient is not."""
    problem = Problem(plain((70,), (3,)), groups=[{"lr": 1e-3}])
    problem.note(norm_count=5.0, norm_mean=1.0, norm_variance=0.5)
    problem.rows["grad"][0].fill_(1e25)
    backend.step(problem, max_norm=max_norm)
    entries = read_ledger(problem.ledger)
    assert (entries["nonfinite"], entries["applied"], entries["norm"]) == (0, 1, math.inf)
    for name in ("weight", "exp_avg", "slow_ema"):
        assert all(tensor.isfinite().all() for tensor in problem.rows[name]), name
    poisoned = {n: v for n, v in entries.items() if n != "norm" and not n.startswith("loss")}
    assert all(map(math.isfinite, poisoned.values())), f"running statistics: {poisoned}"


@BACKENDS
def test_thresholds_may_be_integers_and_zero_clips_everything(backend: Checked) -> None:
    one, two, clipped = (Problem(plain((70,)), groups=[{"lr": 1e-2}]) for _ in range(3))
    before = clipped.rows["exp_avg"][0].clone()
    for problem, max_norm in ((one, 1), (two, 1.0), (clipped, 0.0)):
        backend.step(problem, max_norm=max_norm)
    two.assert_same(one)
    assert_near(clipped.rows["exp_avg"][0], 0.9 * before, "exp_avg")
