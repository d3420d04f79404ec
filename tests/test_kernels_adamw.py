"""Fused AdamW: kernel and CPU backend against an FP64 oracle, and what must hold bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    GROUPS,
    ONE,
    PRECISIONS,
    THREE,
    FarAway,
    Problem,
    Spec,
    assert_ledgers_near,
    assert_near,
    assert_same_bits,
    counted_launches,
    fewer,
    plain,
    precisions,
    set_entries,
    spec_lists,
)
from triton_hybrid.kernels import chunks
from triton_hybrid.kernels.adamw import (
    Workspace,
    adamw_step,
    adamw_step_reference,
)
from triton_hybrid.kernels.adamw_reference import _scalars, _update_unless, averaging_rates
from triton_hybrid.kernels.chunks import INTERPRETED, TensorSet
from triton_hybrid.kernels.ledger import new_ledger, read_ledger

WRITTEN = ("weight", "exp_avg", "exp_avg_sq", "slow_ema", "weight_ema")


def run(
    *problems: Problem,
    max_norm: float | None = None,
    slow_beta: float = 0.9,
    observed: bool = True,
    measured: bool = True,
    level: bool = True,
    cooperative: bool | None = None,
) -> None:
    """One step of the kernel over problems that share the first one's ledger."""
    first = problems[0]
    sets = [problem.set for problem in problems]
    workspace = first.workspace if len(sets) == 1 else Workspace(sets)
    if cooperative is None and first.set.tiling.programs > 1 and INTERPRETED:
        cooperative = False
    adamw_step(
        sets,
        [problem.group for problem in problems],
        [problem.steps for problem in problems],
        first.hyper,
        first.ledger,
        workspace,
        max_norm=max_norm,
        slow_beta=slow_beta,
        observed=observed,
        measured=measured,
        level=level,
        cooperative=cooperative,
    )
    assert workspace.arrivals.tolist() == [0, 0], "left as it was found"
    for problem in problems:
        problem.check()


def run_reference(
    *problems: Problem,
    max_norm: float | None = None,
    slow_beta: float = 0.9,
    observed: bool = True,
    measured: bool = True,
    level: bool = True,
) -> None:
    """One step of the plain-torch backend."""
    adamw_step_reference(
        [problem.set for problem in problems],
        [problem.group for problem in problems],
        [problem.steps for problem in problems],
        problems[0].hyper,
        problems[0].ledger,
        max_norm=max_norm,
        slow_beta=slow_beta,
        observed=observed,
        measured=measured,
        level=level,
    )
    for problem in problems:
        problem.check()


BACKENDS = pytest.mark.parametrize("step", [run, run_reference], ids=["triton", "torch"])
Step = Callable[..., None]

# -------------------------------------------------------------------------- the reference


@given(
    drawn=spec_lists(groups=3, absent=True),
    precision=precisions(),
    max_norm=st.sampled_from((None, 0.5, 1e6)),
    slow_beta=st.sampled_from((0.0, 0.5, 0.99)),
    slow_count=st.sampled_from((0, 1, 100)),
    measured=st.booleans(),
    programs=st.booleans(),
)
def test_kernel_and_cpu_backend_match_the_fp64_oracle(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    max_norm: float | None,
    slow_beta: float,
    slow_count: int,
    measured: bool,
    programs: bool,
) -> None:
    tiling = THREE if programs else ONE
    problem = Problem(drawn, device, precision=precision, tiling=tiling)
    set_entries(problem.ledger, slow_count=slow_count, loss=2.0, loss_previous=2.5)
    options: dict[str, Any] = {"max_norm": max_norm, "slow_beta": slow_beta, "measured": measured}
    oracle, backend = problem.promoted(), Problem(drawn, device, precision=precision)
    backend.copy_(problem)
    written = WRITTEN if slow_beta else WRITTEN[:3]
    before = problem.snapshot()

    run(problem, **options)
    run_reference(backend, **options)
    run_reference(oracle, **options)

    for actual in (problem, backend):
        actual.assert_near(oracle, written, rtol=4e-6, atol=1e-6)
        assert torch.equal(actual.steps, oracle.steps)
        assert_ledgers_near(actual.ledger, oracle.ledger)
        actual.assert_unchanged(before, but=("param", "steps", *written))
        for index, spec in enumerate(drawn):
            assert actual.steps[index] == spec.step + spec.present
            if not spec.present:
                for name in ("param", *written):
                    assert_same_bits(actual.rows[name][index], before[name][index], name)


@fewer(3)
@given(
    drawn=spec_lists(max_size=2),
    maximize=st.booleans(),
    weight_decay=st.sampled_from((0.0, 0.3)),
    betas=st.sampled_from(((0.9, 0.999), (0.0, 0.9), (0.5, 0.5))),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize(
    ("step", "steps"), [(run, 4), (run_reference, 20)], ids=["triton", "torch"]
)
def test_is_torch_adamw(
    device: torch.device,
    step: Step,
    steps: int,
    drawn: list[Spec],
    maximize: bool,
    weight_decay: float,
    betas: tuple[float, float],
    seed: int,
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": weight_decay}
    group = {**options, "beta1": betas[0], "beta2": betas[1], "sign": -1.0 if maximize else 1.0}
    problem = Problem(drawn, device, groups=[group])
    problem.steps.zero_()
    theirs = [weight.double().clone() for weight in problem.rows["weight"]]
    adamw = torch.optim.AdamW(theirs, betas=betas, maximize=maximize, **options)
    for name in ("exp_avg", "exp_avg_sq", "slow_ema"):
        for state in problem.rows[name]:
            state.zero_()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for index, param in enumerate(theirs):
            grad = torch.randn(param.shape, generator=generator)
            problem.rows["grad"][index].copy_(grad)
            param.grad = grad.double().to(device)
        problem.set_gradients()
        step(problem, slow_beta=0.0, observed=False)
        adamw.step()
    for index, param in enumerate(theirs):
        scale = float(param.abs().max()) if param.numel() else 0.0
        assert_near(problem.rows["weight"][index], param, f"weight[{index}]", 1e-6, 1e-6 * scale)


def test_twenty_fp64_steps_are_torch_adamw_to_the_last_digits(device: torch.device) -> None:
    problem = Problem(plain((70,)), device, precision=PRECISIONS[4], groups=[{"lr": 1e-2}])
    problem.steps.zero_()
    param = problem.rows["weight"][0].clone()
    adamw = torch.optim.AdamW([param], lr=1e-2, weight_decay=0.0)
    for name in ("exp_avg", "exp_avg_sq"):
        problem.rows[name][0].zero_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        param.grad = torch.randn(70, generator=generator, dtype=torch.float64).to(device)
        problem.rows["grad"][0].copy_(param.grad)
        run(problem, slow_beta=0.0, observed=False)
        adamw.step()
    assert_near(problem.rows["weight"][0], param, "weight", rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_backend_that_never_waits_for_the_device_matches_too(
    device: torch.device, precision: tuple[torch.dtype, torch.dtype]
) -> None:
    """Plain torch on a GPU writes a skipped step back as it was instead of returning early."""
    problem = Problem(plain((130,), (5, 7)), device, precision=precision)
    oracle, before = problem.promoted(), problem.snapshot()
    run_reference(oracle, slow_beta=0.5)
    coefficient = torch.ones((), dtype=torch.float64, device=device)
    table = _scalars(problem.group, problem.steps, problem.hyper, coefficient)
    rows = [row.unbind() for row in table.to(problem.set.compute_dtype).unbind()]
    norm = torch.ones_like(coefficient)
    rates = averaging_rates(problem.ledger, 0.5, norm, coefficient)
    for skip in (True, False):
        skipped = torch.tensor(skip, device=device)
        sums = _update_unless(problem.set, rows, skipped, rates, measured=True)
        problem.check()
        if skip:
            problem.assert_unchanged(before)
    problem.assert_near(oracle, WRITTEN, rtol=4e-6, atol=1e-6)
    entries = read_ledger(oracle.ledger)
    measured = [entries[name] for name in ("update_square", "update_slow", "slow_slow")]
    expected = [measured[0], 5 * measured[1], 5 * measured[2]]
    assert sums[:3].tolist() == pytest.approx(expected, rel=1e-5)


def test_reference_works_block_by_block(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (Problem(plain((300,), (5, 7)), device) for _ in range(2))
    run_reference(whole, max_norm=1.0)
    monkeypatch.setattr(chunks, "REFERENCE_BLOCK", 37)
    run_reference(cut, max_norm=1.0)
    cut.assert_near(whole, WRITTEN, rtol=1e-6)
    assert_ledgers_near(cut.ledger, whole.ledger, rtol=1e-6)


# ------------------------------------------------------------------- one launch, any list


@BACKENDS
@fewer(5)
@given(drawn=spec_lists(min_size=2, groups=3, absent=True), precision=precisions(), data=st.data())
def test_many_tensors_in_one_launch_are_each_alone_in_any_order(
    device: torch.device,
    step: Step,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    data: st.DataObject,
) -> None:
    together = Problem(drawn, device, precision=precision, tiling=THREE)
    step(together)
    order = data.draw(st.permutations(range(len(drawn))), label="order")
    shuffled = Problem([drawn[i] for i in order], device, precision=precision)
    step(shuffled)
    shuffled.assert_same(together, order, ("param", *WRITTEN))
    assert torch.equal(shuffled.steps.cpu(), together.steps.cpu()[list(order)])
    for index, spec in enumerate(drawn):
        alone = Problem([spec], device, precision=precision)
        step(alone)
        alone.assert_same(together, [index], ("param", *WRITTEN))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_alignment_changes_no_bit(
    device: torch.device, precision: tuple[torch.dtype, torch.dtype]
) -> None:
    """Full, aligned chunks take wide accesses, the rest takes masked ones in smaller blocks."""
    aligned = Problem(plain((300,), (128,)), device, precision=precision)
    shifted = Problem(plain((300,), (128,), shift=1), device, precision=precision)
    assert aligned.set.tables()[2].tolist() == [1, 1]
    assert shifted.set.tables()[2].tolist() == [0, 0]
    for problem in (aligned, shifted):
        run(problem)
    shifted.assert_same(aligned, (0, 1), ("param", *WRITTEN))


@fewer()
@given(drawn=spec_lists(absent=True), max_norm=st.sampled_from((None, 0.3)))
def test_one_cooperative_launch_is_two_launches(
    device: torch.device, drawn: list[Spec], max_norm: float | None
) -> None:
    one, two = (Problem(drawn, device) for _ in range(2))
    for _ in range(2):
        run(one, max_norm=max_norm, cooperative=True)
        run(two, max_norm=max_norm, cooperative=False)
    two.assert_same(one, range(len(drawn)), ("param", *WRITTEN))
    assert_same_bits(two.ledger, one.ledger, "ledger")


@pytest.mark.parametrize("tiling", [ONE, THREE], ids=["one program", "three programs"])
def test_five_runs_give_the_same_bits(device: torch.device, tiling: chunks.Tiling) -> None:
    def once() -> Problem:
        problem = Problem(plain((300,), (7, 9), (), (0,)), device, tiling=tiling)
        run(problem, max_norm=0.1)
        return problem

    first = once()
    for _ in range(4):
        again = once()
        again.assert_same(first, range(4), ("param", *WRITTEN))
        assert_same_bits(again.ledger, first.ledger, "ledger")


@pytest.mark.parametrize("slow_beta", [0.0, 0.9])
def test_offsets_beyond_32_bits(device: torch.device, slow_beta: float) -> None:
    near, far = (Problem(plain((200,), (130,)), device, precision=PRECISIONS[2]) for _ in range(2))
    run(near, max_norm=1.0, slow_beta=slow_beta)
    with FarAway(far.set):
        run(far, max_norm=1.0, slow_beta=slow_beta)
    far.assert_same(near, (0, 1), ("param", *WRITTEN))


def test_sets_of_several_dtypes_are_clipped_by_one_norm(device: torch.device) -> None:
    half = Problem(plain((130,), (3,)), device, precision=PRECISIONS[1], tiling=THREE)
    single = Problem(plain((70,), (4, 4)), device, tiling=THREE)
    oracles = [half.promoted(), single.promoted()]
    backends = [
        Problem(p.specs, device, precision=(p.param_dtype, p.grad_dtype)) for p in (half, single)
    ]
    run(half, single, max_norm=0.5)
    run_reference(*backends, max_norm=0.5)
    run_reference(*oracles, max_norm=0.5)
    squares = [g.double().square().sum() for p in oracles for g in p.rows["grad"]]
    for ledger in (half.ledger, backends[0].ledger):
        assert read_ledger(ledger)["norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        assert_ledgers_near(ledger, oracles[0].ledger)
    for actual in ((half, single), backends):
        for mine, oracle in zip(actual, oracles):
            mine.assert_near(oracle, WRITTEN, rtol=4e-6, atol=1e-6)
            assert torch.equal(mine.steps, oracle.steps)


# ------------------------------------------------------------------- what is not applied

BOOKS = {"nonfinite", "skipped", "loss", "hold", "applied", "norm"}


def changed_entries(before: torch.Tensor, after: torch.Tensor) -> set[str]:
    """Names of the ledger entries that differ."""
    left, right = read_ledger(before), read_ledger(after)
    return {
        n
        for n in left
        if left[n] != right[n] and not (math.isnan(left[n]) and math.isnan(right[n]))
    }


@BACKENDS
@fewer(6)
@given(
    drawn=spec_lists(absent=True).filter(lambda list_: any(s.present and s.numel for s in list_)),
    precision=precisions(),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    max_norm=st.sampled_from((None, 1.0)),
    data=st.data(),
)
def test_a_nonfinite_gradient_changes_no_byte_but_its_counter(
    device: torch.device,
    step: Step,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    value: float,
    max_norm: float | None,
    data: st.DataObject,
) -> None:
    problem = Problem(drawn, device, precision=precision, tiling=THREE)
    candidates = [i for i, spec in enumerate(drawn) if spec.present and spec.numel]
    index = data.draw(st.sampled_from(candidates), label="tensor")
    element = data.draw(st.integers(0, drawn[index].numel - 1), label="element")
    grad = problem.rows["grad"][index]
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), grad.shape))
    grad[place] = value
    problem.set_gradients()
    set_entries(problem.ledger, loss=3.0, norm=7.0, applied=5.0, cooldown=2.0, slow_count=9.0)
    before, ledger = problem.snapshot(), problem.ledger.clone()

    step(problem, max_norm=max_norm)

    problem.assert_unchanged(before)
    after = read_ledger(problem.ledger)
    assert changed_entries(ledger, problem.ledger) == {"nonfinite", "skipped", "loss"}
    assert (after["nonfinite"], after["skipped"]) == (1, 1)

    grad[place] = 1.0
    problem.set_gradients()
    step(problem, max_norm=max_norm)
    after = read_ledger(problem.ledger)
    assert (after["nonfinite"], after["skipped"], after["applied"]) == (0, 1, 6)
    assert torch.equal(
        problem.steps,
        before["steps"][0] + torch.tensor([float(s.present) for s in drawn]).to(device),
    )


@BACKENDS
def test_a_nonfinite_gradient_in_one_set_holds_every_set_back(
    device: torch.device, step: Step
) -> None:
    half = Problem(plain((130,)), device, precision=PRECISIONS[1])
    single = Problem(plain((70,), (5,)), device)
    single.rows["grad"][1][4] = math.nan
    before = half.snapshot(), single.snapshot()
    step(half, single, max_norm=1.0)
    half.assert_unchanged(before[0])
    single.assert_unchanged(before[1])
    assert read_ledger(half.ledger)["skipped"] == 1


@BACKENDS
@fewer()
@given(drawn=spec_lists(absent=True), precision=precisions())
def test_a_held_step_changes_no_byte_and_is_held_once(
    device: torch.device,
    step: Step,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
) -> None:
    problem = Problem(drawn, device, precision=precision)
    set_entries(problem.ledger, hold=1.0, loss=1.0)
    before, ledger = problem.snapshot(), problem.ledger.clone()
    step(problem)
    problem.assert_unchanged(before)
    changed = changed_entries(ledger, problem.ledger)
    assert changed | {"norm"} == {"norm", "hold", "loss"}
    step(problem)
    assert read_ledger(problem.ledger)["applied"] == 1
    assert read_ledger(problem.ledger)["skipped"] == 0


@BACKENDS
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_denormal_gradients_are_gradients(
    device: torch.device, step: Step, precision: tuple[torch.dtype, torch.dtype]
) -> None:
    problem = Problem(plain((70,)), device, precision=precision)
    problem.rows["grad"][0].fill_(torch.finfo(precision[1]).smallest_normal / 4)
    assert (problem.rows["grad"][0] != 0).all(), "the denormal itself is there"
    step(problem, max_norm=1.0)
    entries = read_ledger(problem.ledger)
    assert (entries["nonfinite"], entries["applied"]) == (0, 1)
    assert problem.rows["weight"][0].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_finite_gradients_whose_square_overflows_are_applied(
    device: torch.device, step: Step, max_norm: float | None
) -> None:
    """1e25 squared is no FP32 number: the norm is infinite, the gradient is not."""
    problem = Problem(plain((70,), (3,)), device, groups=[{"lr": 1e-3}])
    set_entries(problem.ledger, norm_count=5.0, norm_mean=1.0, norm_variance=0.5)
    problem.rows["grad"][0].fill_(1e25)
    step(problem, max_norm=max_norm)
    entries = read_ledger(problem.ledger)
    assert (entries["nonfinite"], entries["applied"], entries["norm"]) == (0, 1, math.inf)
    for name in ("weight", "exp_avg", "slow_ema"):
        assert all(tensor.isfinite().all() for tensor in problem.rows[name]), name
    poisoned = {n: v for n, v in entries.items() if n != "norm" and not n.startswith("loss")}
    assert all(map(math.isfinite, poisoned.values())), f"running statistics: {poisoned}"


@BACKENDS
@pytest.mark.parametrize("shapes", [((0,),), ((3, 0), (0, 3))], ids=str)
def test_nothing_but_empty_tensors(
    device: torch.device, step: Step, shapes: Sequence[tuple[int, ...]]
) -> None:
    problem = Problem(plain(*shapes), device)
    step(problem, max_norm=1.0)
    assert read_ledger(problem.ledger)["norm"] == 0


@BACKENDS
def test_more_tensors_than_one_row_of_the_books(device: torch.device, step: Step) -> None:
    """GPT-2 small has 148. Empty ones cost no chunk, and still count their steps."""
    drawn = plain(*[(0,)] * 140, (70,), (3,))
    drawn = [replace(spec, present=index % 3 > 0) for index, spec in enumerate(drawn)]
    problem = Problem(drawn, device)
    before = problem.snapshot()
    step(problem)
    assert problem.steps.tolist() == [spec.step + spec.present for spec in drawn]
    for index in (140, 141):
        same = torch.equal(problem.rows["weight"][index], before["weight"][index])
        assert same == (not drawn[index].present)


@BACKENDS
def test_no_gradient_at_all(device: torch.device, step: Step) -> None:
    problem = Problem(plain((70,), (3,), present=False), device)
    before = problem.snapshot()
    step(problem)
    problem.assert_unchanged(before)


# -------------------------------------------------------------------------------- details


def test_launch_counts(device: torch.device) -> None:
    problem = Problem(plain((300,), (7, 9)), device)
    for max_norm in (None, 1.0):
        with counted_launches() as log:
            run(problem, max_norm=max_norm)
        assert log == ["_adamw_kernel"]
    with counted_launches() as log:
        run(problem, cooperative=False)
    assert log == ["_adamw_kernel"] * 2
    other = Problem(plain((70,)), device, precision=PRECISIONS[1])
    with counted_launches() as log:
        run(problem, other, max_norm=1.0)
    assert log == ["_adamw_kernel"] * 4


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_several_programs_never_wait_for_each_other_in_the_interpreter(
    device: torch.device,
) -> None:
    """They run one after another there, so a grid barrier would wait forever."""
    problem = Problem(plain((300,)), device, tiling=THREE)
    arguments = [problem.set], [problem.group], [problem.steps], problem.hyper, problem.ledger
    options = {"max_norm": None, "slow_beta": 0.0, "observed": False}
    with counted_launches() as log:
        adamw_step(*arguments, problem.workspace, **options)  # type: ignore[arg-type]
    assert log == ["_adamw_kernel"] * 2
    with pytest.raises(ValueError, match=r"cooperative=True: .*programs=1"):
        adamw_step(*arguments, problem.workspace, cooperative=True, **options)  # type: ignore[arg-type]


def test_integer_thresholds_are_numbers_too(device: torch.device) -> None:
    one, two = (Problem(plain((70,)), device) for _ in range(2))
    run(one, max_norm=1)
    run(two, max_norm=1.0)
    two.assert_same(one, [0], WRITTEN)


@BACKENDS
def test_a_threshold_of_zero_clips_everything(device: torch.device, step: Step) -> None:
    problem = Problem(plain((70,)), device, groups=[{"lr": 1e-2}])
    before = problem.rows["exp_avg"][0].clone()
    step(problem, max_norm=0.0)
    assert_near(problem.rows["exp_avg"][0], 0.9 * before, "exp_avg")


@BACKENDS
def test_without_observation_only_the_books_of_the_gradient_are_kept(
    device: torch.device, step: Step
) -> None:
    problem = Problem(plain((70,)), device)
    set_entries(problem.ledger, cooldown=3.0, loss=1.0)
    before = problem.ledger.clone()
    step(problem, slow_beta=0.0, observed=False)
    assert changed_entries(before, problem.ledger) <= BOOKS


@BACKENDS
def test_the_first_gradient_is_the_slow_ema_and_later_ones_are_averaged(
    device: torch.device, step: Step
) -> None:
    """After n gradients the decay is n/(n+4), at most slow_beta: written out by hand."""
    problem = Problem(plain((70,)), device, groups=[{"lr": 1e-3}])
    slow_beta, generator = 0.4, torch.Generator().manual_seed(1)
    expected = torch.zeros(70, dtype=torch.float64)
    for n in range(5):
        grad = torch.randn(70, generator=generator)
        problem.rows["grad"][0].copy_(grad)
        decay = min(n / (n + 4), slow_beta)
        expected = decay * expected + (1 - decay) * grad.double()
        step(problem, slow_beta=slow_beta)
        assert_near(problem.rows["slow_ema"][0], expected, f"slow EMA after {n + 1}", atol=1e-6)


def test_both_backends_keep_the_same_ledger(device: torch.device) -> None:
    """Losses that are missing, infinite or not, cooldowns, clipping, over several steps."""
    triton, torch_ = (Problem(plain((130,), (5, 7)), device) for _ in range(2))
    losses = (math.nan, 3.0, 2.5, math.inf, 2.6, math.nan, 2.0, 2.1)
    generator = torch.Generator().manual_seed(2)
    for problem in (triton, torch_):
        set_entries(problem.ledger, cooldown=2.0)
    for number, loss in enumerate(losses):
        grads = [torch.randn(spec.shape, generator=generator) for spec in triton.specs]
        for problem, step in ((triton, run), (torch_, run_reference)):
            for mine, grad in zip(problem.rows["grad"], grads):
                mine.copy_(grad)
            if number == 4:
                problem.rows["grad"][0][3] = math.nan
            set_entries(problem.ledger, loss=loss)
            step(problem, max_norm=5.0, slow_beta=0.6)
        assert_ledgers_near(triton.ledger, torch_.ledger)
    entries = read_ledger(triton.ledger)
    assert (entries["applied"], entries["skipped"], entries["norm_count"]) == (7, 1, 7)
    assert entries["cooldown"] == 0
    # 3.0 → 2.5 and 2.0 → 2.1 are changes, and 2.5 → 2.0 over the skipped and the missing one.
    assert entries["loss_count"] == 3
    assert entries["loss_previous"] == 2.1
    assert math.isnan(entries["loss"])


def test_a_fresh_ledger_knows_nothing(device: torch.device) -> None:
    entries = read_ledger(new_ledger(device))
    assert {name for name, value in entries.items() if value == 1} == {
        "horizon",
        "step_fraction",
        "loss_scale",
    }
    assert {name for name, value in entries.items() if value != value} == {"loss", "loss_previous"}


def test_default_tiling_and_default_launch(device: torch.device) -> None:
    """As the optimizer calls it: no tiling given, nothing forced."""
    weight = torch.randn(70_000, device=device)
    rows = {name: [torch.zeros_like(weight)] for name in ("exp_avg", "exp_avg_sq", "grad")}
    rows["grad"][0].fill_(0.5)
    tensors = TensorSet({"param": [weight.clone()], **rows})
    problem = Problem(plain((1,)), device, groups=GROUPS[:1])
    problem.steps.zero_()
    arguments = [tensors], [problem.group], [problem.steps], problem.hyper, problem.ledger
    workspace = Workspace([tensors])
    adamw_step(*arguments, workspace, max_norm=None, slow_beta=0.0, observed=False)
    expected = weight.double() * (1 - 1e-2 * 0.1) - 1e-2
    assert_near(tensors.flat["weight"][0], expected, "weight", rtol=1e-6, atol=1e-6)
