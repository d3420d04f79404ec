"""The base step: kernels and plain torch against an FP64 oracle, and what it keeps besides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, KERNELS, PLAIN, Checked, counted_launches
from kernel_memory import DEVICE, assert_near, assert_same_bits
from kernel_problems import Make, Problem, assert_ledgers_near, changed_entries, problems
from kernel_specs import FP16, FP32, FP64, ONE, PRECISIONS, THREE, Precision, fewer, plain, some
from triton_hybrid.kernels import multi_tensor
from triton_hybrid.kernels.launch import INTERPRETED
from triton_hybrid.kernels.ledger import read_ledger
from triton_hybrid.kernels.running import OUTLIER
from triton_hybrid.kernels.step_torch import _update, averaging_rates, update_numbers

from triton_hybrid.rules import RULES

EVERY_RULE = pytest.mark.parametrize("rule", RULES)
STEADY = {"lr": 1e-2, "weight_decay": 0.1, "horizon": 0.0}


@pytest.mark.parametrize("slow", [True, False], ids=["slow EMA", "none kept"])
@EVERY_RULE
@given(
    data=st.data(),
    slow_count=st.sampled_from((0, 1, 100)),
    max_norm=st.sampled_from((None, 0.5, 1e6)),
    slow_beta=st.sampled_from((0.0, 0.5, 0.99)),
    measured=st.booleans(),
)
def test_both_backends_match_the_fp64_oracle(
    rule: str, slow: bool, data: st.DataObject, slow_count: int, **options: Any
) -> None:
    make = data.draw(problems(rule, groups=3, absent=True))
    without = () if slow else ("slow_ema",)
    problem, twin = make(without=without), make(without=without)
    for actual in (problem, twin):
        actual.note(slow_count=slow_count, loss=2.0, loss_previous=2.5)
    oracle, before = problem.promoted(), problem.snapshot()
    written = ["weight", *problem.moments, *["slow_ema"] * (slow and options["slow_beta"] > 0)]

    for actual, backend in ((problem, KERNELS), (twin, PLAIN), (oracle, PLAIN)):
        backend.step(actual, **options)

    for actual in (problem, twin):
        actual.assert_near(oracle, problem.state, rtol=4e-6, atol=1e-6)
        assert torch.equal(actual.tensors.steps, oracle.tensors.steps)
        # Newton-Schulz steps blow differences of rounding up.
        near = 1e-5 if actual.tensors.matrices is None else 1e-4
        assert_ledgers_near(actual.ledger, oracle.ledger, rtol=near)
        actual.assert_unchanged(before, but=("steps", *written, *actual.worked_out))
        for index, spec in enumerate(problem.specs):
            assert actual.tensors.steps[index] == spec.step + spec.present
            if not spec.present:
                for name in ("param", *problem.state):
                    assert_same_bits(actual.values(name)[index], before[name][index], name)


@fewer(3)
@given(
    make=problems(max_size=2),
    sign=st.sampled_from((1.0, -1.0)),
    weight_decay=st.sampled_from((0.0, 0.3)),
    beta1=st.sampled_from((0.9, 0.0)),
    beta2=st.sampled_from((0.999, 0.5)),
)
@pytest.mark.parametrize(
    ("backend", "precision", "steps"),
    [(KERNELS, FP32, 4), (PLAIN, FP32, 20), (KERNELS, FP64, 12)],
    ids=str,
)
def test_is_torch_adamw(
    backend: Checked, precision: Precision, steps: int, make: Make, sign: float, **group: float
) -> None:
    """In FP64 to the last digits."""
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": group["weight_decay"]}
    options["betas"] = group["beta1"], group["beta2"]
    problem = make(groups=[{**group, "lr": 1e-2, "sign": sign}], precision=precision)
    problem.tensors.steps.zero_()
    theirs = [weight.double().clone() for weight in problem.rows["weight"]]
    adamw = torch.optim.AdamW(theirs, maximize=sign < 0, **options)
    for name in problem.moments:
        for state in problem.rows[name]:
            state.zero_()
    generator = torch.Generator().manual_seed(len(theirs))
    for _ in range(steps):
        for index, param in enumerate(theirs):
            grad = torch.randn(param.shape, generator=generator, dtype=precision.grad)
            problem.rows["grad"][index].copy_(grad)
            param.grad = grad.double().to(DEVICE)
        problem.set_gradients()
        backend.step(problem, slow_beta=0.0, observed=False)
        adamw.step()
    # In FP32 the kernel's 1 - beta2 is 1e-5 off, and so is an early update by half of that.
    near, off = (1e-12, 1e-14) if precision == FP64 else (1e-6, 1e-7 * steps)
    for actual, param in zip(problem.rows["weight"], theirs):
        scale = float(param.abs().max()) if param.numel() else 0.0
        assert_near(actual, param, "weight", near, off + near * scale)


@EVERY_RULE
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_torch_step_that_never_waits_for_the_device_matches_too(
    rule: str, precision: Precision
) -> None:
    """Plain torch on a GPU writes a skipped step back as it was instead of returning early."""
    problem = Problem(some(rule=rule), rule=rule, precision=precision)
    oracle, before = problem.promoted(), problem.snapshot()
    PLAIN.step(oracle, slow_beta=0.5)
    tensors, scalars, prepare = problem.tensors, problem.scalars, problem.rule.kernels.prepare_torch
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    rates = averaging_rates(problem.ledger, 0.5, one, one)
    for skip in (True, False):
        skipped = torch.tensor(skip, device=DEVICE)
        if prepare is not None:
            prepare(tensors, scalars, one, skipped)
        table = update_numbers(tensors, scalars, one)
        sums = _update(tensors, table, skipped, rates, True, not tensors.frozen)
        problem.check()
        if skip:
            problem.assert_unchanged(before, but=problem.worked_out)
    problem.assert_near(oracle, problem.state, rtol=4e-6, atol=1e-6)
    entries, names = read_ledger(oracle.ledger), ("update_slow", "slow_slow")
    expected = [entries["update_square"], *(5 * entries[name] for name in names)]
    assert sums[:3].tolist() == pytest.approx(expected, rel=1e-5)


@EVERY_RULE
def test_torch_works_block_by_block(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    whole, cut = (Problem(some(rule=rule), rule=rule) for _ in "ab")
    PLAIN.step(whole, max_norm=1.0)
    monkeypatch.setattr(multi_tensor, "TORCH_BLOCK", max(whole.tensors.lengths) // 8)
    PLAIN.step(cut, max_norm=1.0)
    cut.assert_near(whole, whole.state, rtol=1e-6)
    assert_ledgers_near(cut.ledger, whole.ledger, rtol=1e-6)


# ---------------------------------------------------------------------- launches and sets


@fewer()
@given(make=problems(absent=True), max_norm=st.sampled_from((None, 0.3)))
def test_one_cooperative_launch_is_two_launches(make: Make, max_norm: float | None) -> None:
    one, two = (make(tiling=ONE) if INTERPRETED else make() for _ in "ab")
    for _ in range(2):
        KERNELS.step(one, max_norm=max_norm, cooperative=True)
        KERNELS.step(two, max_norm=max_norm, cooperative=False)
    two.assert_same(one)
    assert_same_bits(two.ledger, one.ledger, "ledger")


@EVERY_RULE
@pytest.mark.parametrize("order", [1, -1])
def test_sets_of_several_dtypes_and_rules_are_clipped_by_one_norm(rule: str, order: int) -> None:
    half = Problem(plain((130,), (3,)), precision=FP16, tiling=THREE)
    other = Problem(plain((7, 10), (4, 4)), rule=rule, tiling=THREE)
    kernels = [half, other][::order]
    oracles = [problem.promoted() for problem in kernels]
    twins = [problem.twin() for problem in kernels]
    for every, backend in ((kernels, KERNELS), (twins, PLAIN), (oracles, PLAIN)):
        every[0].share(*every[1:])
        backend.step(*every, max_norm=0.5)
    squares = [g.double().square().sum() for p in oracles for g in p.rows["grad"]]
    for every in (kernels, twins):
        ledger = every[0].ledger
        assert read_ledger(ledger)["norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        near = 1e-5 if other.tensors.matrices is None else 1e-4
        assert_ledgers_near(ledger, oracles[0].ledger, rtol=near)
        for mine, oracle in zip(every, oracles):
            mine.assert_near(oracle, mine.state, rtol=4e-6, atol=1e-6)
            assert torch.equal(mine.tensors.steps, oracle.tensors.steps)


@BACKENDS
def test_more_tensors_than_one_row_of_the_books(backend: Checked) -> None:
    """GPT-2 small has 148. Empty ones cost no chunk, and still count their steps."""
    drawn = plain(*[(0,)] * 140, (70,), (3,))
    drawn = [replace(spec, present=index % 3 > 0) for index, spec in enumerate(drawn)]
    problem = Problem(drawn)
    before = problem.snapshot()
    backend.step(problem)
    assert problem.tensors.steps.tolist() == [spec.step + spec.present for spec in drawn]
    for index in (140, 141):
        same = torch.equal(problem.rows["weight"][index], before["weight"][index])
        assert same == (not drawn[index].present)


def test_a_second_set_costs_a_second_pair_of_launches() -> None:
    problem, other = Problem(plain((70,))), Problem(plain((70,)), precision=FP16)
    with counted_launches() as log:
        KERNELS.step(problem, max_norm=1.0)
        KERNELS.step(problem, cooperative=False)
        problem.share(other)
        KERNELS.step(problem, other, max_norm=1.0)
    assert log == ["_step_kernel"] * (1 + 2 + 4)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_several_programs_never_wait_for_each_other_in_the_interpreter() -> None:
    """They run one after another there, so a grid barrier would wait forever."""
    problem = Problem(plain((300,)), tiling=THREE)
    with counted_launches() as log:
        KERNELS.step(problem)
    assert log == ["_step_kernel"] * 2
    with pytest.raises(ValueError, match=r"cooperative=True: .*programs=1"):
        KERNELS.step(problem, cooperative=True)


def test_default_tiling_and_default_launch() -> None:
    """As the optimizer calls it: no tiling given, nothing forced."""
    problem = Problem(plain((70_000,)), tiling=None)
    oracle = problem.promoted()
    for actual, backend in ((problem, KERNELS), (oracle, PLAIN)):
        backend.step(actual, slow_beta=0.0, observed=False)
    problem.assert_near(oracle, problem.state, rtol=4e-6, atol=1e-6)


# -------------------------------------------------------------------------- the averages


@BACKENDS
def test_the_first_gradient_is_the_slow_ema_and_later_ones_are_averaged(backend: Checked) -> None:
    """After n gradients the decay is n/(n+4), at most slow_beta: written out by hand."""
    problem = Problem(plain((70,)), groups=[{"lr": 1e-3}])
    slow_beta, generator = 0.4, torch.Generator().manual_seed(1)
    expected = torch.zeros(70, dtype=torch.float64)
    for n in range(5):
        grad = torch.randn(70, generator=generator)
        problem.rows["grad"][0].copy_(grad)
        decay = min(n / (n + 4), slow_beta)
        expected = decay * expected + (1 - decay) * grad.double()
        backend.step(problem, slow_beta=slow_beta)
        assert_near(problem.rows["slow_ema"][0], expected, f"slow EMA after {n + 1}", atol=1e-6)


@BACKENDS
def test_an_outlier_enters_the_slow_ema_at_twice_the_usual_norm(backend: Checked) -> None:
    problem = Problem(some(), groups=(STEADY,))
    norm = float(torch.stack([g.double().norm() for g in problem.rows["grad"]]).norm())
    problem.note(norm_count=30, norm_mean=math.log(norm / 50), slow_count=4)
    before = problem.snapshot()
    backend.step(problem)
    for old, gradient, now in zip(before["slow_ema"], before["grad"], problem.rows["slow_ema"]):
        assert_near(now, 0.5 * old + 0.5 * (OUTLIER.value / 50) * gradient, "slow EMA", atol=1e-6)
    assert read_ledger(problem.ledger)["norm"] == pytest.approx(norm), "decisions see all of it"


# ------------------------------------------------------------------------------ the ledger


@BACKENDS
def test_without_observation_only_the_books_of_the_gradient_are_kept(backend: Checked) -> None:
    problem = Problem(plain((70,)))
    problem.note(cooldown=3.0, loss=1.0)
    before = problem.ledger.clone()
    backend.step(problem, slow_beta=0.0, observed=False)
    books = {"nonfinite", "skipped", "loss", "hold", "applied", "norm"}
    assert changed_entries(before, problem.ledger) <= books


def test_both_backends_keep_the_same_ledger() -> None:
    """Losses that are missing, infinite or not, cooldowns, clipping, over several steps."""
    both = [Problem(plain((130,), (5, 7))) for _ in range(2)]
    losses = (math.nan, 3.0, 2.5, math.inf, 2.6, math.nan, 2.0, 2.1)
    generator = torch.Generator().manual_seed(2)
    for problem in both:
        problem.note(cooldown=2.0)
    for number, loss in enumerate(losses):
        grads = [torch.randn(spec.shape, generator=generator) for spec in both[0].specs]
        for problem, backend in zip(both, (KERNELS, PLAIN)):
            for mine, grad in zip(problem.rows["grad"], grads):
                mine.copy_(grad)
            if number == 4:
                problem.rows["grad"][0][3] = math.nan
            problem.note(loss=loss)
            backend.step(problem, max_norm=5.0, slow_beta=0.6)
        assert_ledgers_near(both[0].ledger, both[1].ledger)
    entries = read_ledger(both[0].ledger)
    assert (entries["applied"], entries["skipped"], entries["norm_count"]) == (7, 1, 7)
    assert entries["cooldown"] == 0
    # 3.0 → 2.5 and 2.0 → 2.1 are changes, and 2.5 → 2.0 over the skipped and the missing one.
    assert entries["loss_count"] == 3
    # Two of -0.5 have no spread, and the last one counts with 5 · 1e-3 · 2.0 from their mean.
    assert entries["loss_previous"] == pytest.approx(2.0 - 0.5 + 0.01)
    assert entries["loss_limited"] == 1
    assert math.isnan(entries["loss"])
