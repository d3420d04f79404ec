"""Masters that follow an accepted prediction in the base update: the bits of a pass before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, KERNELS, ORTHOGONAL, PLAIN, SLOW_EMA, Checked
from kernel_memory import assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import BF16, FP16, Precision, fewer, plain, some
from triton_hybrid.kernels.audit.cases import cases
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger import FRACTION_COLUMN, PART_COLUMN
from triton_hybrid.kernels.placement import Places, placed_by_update
from triton_hybrid.kernels.step_torch import _update, averaging_rates, update_numbers

from triton_hybrid.rules import RULES

PART, FRACTION = PART_COLUMN.value, FRACTION_COLUMN.value
MOVING = [name for name, rule in RULES.items() if rule.kernels.along is not None]
STEP: dict[str, Any] = {"measured": False, "max_norm": 1.0}


def predicted(
    make: Make, backend: Checked, stretch: int = 1, along: Displacement = SLOW_EMA
) -> Problem:
    """A problem in whose weights a prediction stands."""
    problem = make().confident()
    for number in range(stretch):
        backend.predict(problem, along, first=number == 0, share=0.4)
        backend.check_move(problem)
    return problem


def write(problem: Problem, index: int) -> None:
    """Gives the first element of a parameter a value of its own, and undoes the last one's move."""
    param, weight = problem.rows["param"][index], problem.values("weight")[index]
    if param.numel() > 1:
        last = tuple(size - 1 for size in param.shape)
        param[last] = weight[last]
        param[(0,) * param.ndim] = 7.0


def place(
    backend: Checked, problem: Problem, deferred: bool, along: Displacement = SLOW_EMA
) -> None:
    """Carries the decision out, and makes the base step."""
    sets = problem.tensors, problem.scalars
    backend.backend.correct(*sets, restart=False, again=along, deferred=deferred)
    backend.step(problem, again=[along] if deferred else None, **STEP)


@BACKENDS
@pytest.mark.parametrize("rule", MOVING)
@fewer(6)
@given(
    data=st.data(),
    fractions=st.permutations((1.0, 1.0, 0.625, 1.9)),
    decision=st.sampled_from((1.0, 1.0, 1.0, 0.0, 2.0, 3.0)),
    stretch=st.integers(1, 3),
    along=st.sampled_from((SLOW_EMA, ORTHOGONAL)),
)
def test_in_the_update_is_in_a_pass_before_it(
    backend: Checked, rule: str, data: st.DataObject, fractions: list[float], decision: float,
    stretch: int, along: Displacement,
) -> None:  # fmt: skip
    """Whatever was decided, tensor by tensor, with a gradient or without, written or not."""
    make = data.draw(problems(rule, groups=3, absent=True))
    count = len(make().specs)
    each = st.sampled_from((1.0, 1.0, 0.0, *[-1.0] * (decision > 0)))
    parts = data.draw(st.lists(each, min_size=count, max_size=count), label="parts")
    results = []
    for deferred in (False, True):
        problem = predicted(make, backend, stretch, along)
        problem.decided(*([0.0] if decision == 2.0 else fractions), decision=decision)
        problem.note(hold=float(decision == 2.0))
        for index, part in enumerate(parts):
            problem.prediction[index, PART] = part
            if part < 0:
                problem.prediction[index, FRACTION] = 1.0
                write(problem, index)
        place(backend, problem, deferred, along)
        results.append(problem)
    apart, together = results
    together.assert_same(apart)
    assert_same_bits(together.ledger, apart.ledger, "ledger")
    assert_same_bits(together.scalars.moves, apart.scalars.moves, "moves")


@BACKENDS
@pytest.mark.parametrize("precision", [BF16, FP16], ids=str)
def test_only_what_the_update_leaves_out_is_placed_before_it(
    backend: Checked, precision: Precision
) -> None:
    """Tensors without a gradient; of all others the pass writes nothing."""
    specs = [*plain((300,), (5, 7)), *plain((130,), present=False)]
    problem = predicted(lambda: Problem(specs, precision=precision), backend).decided(1.0)  # type: ignore[arg-type]
    assert placed_by_update(problem.tensors)
    before, points = problem.snapshot(), [point.clone() for point in problem.values("point")]
    sets = problem.tensors, problem.scalars
    backend.backend.correct(*sets, restart=False, again=SLOW_EMA, deferred=True)
    for index, (weight, then) in enumerate(zip(problem.rows["weight"], before["weight"])):
        assert_same_bits(weight, points[2] if index == 2 else then, f"weight[{index}]")
        assert not torch.equal(points[index], then), "it was moved at all"
    problem.assert_unchanged(before, but=("weight",))


@pytest.mark.parametrize("rule", MOVING)
@pytest.mark.parametrize("precision", [BF16, FP16], ids=str)
def test_the_torch_step_that_never_waits_for_the_device_places_too(
    rule: str, precision: Precision
) -> None:
    def make() -> Problem:
        return Problem(some(rule=rule), rule=rule, precision=precision)

    both = []
    for on_cpu in (True, False):
        problem = predicted(make, PLAIN).decided(0.625, 1.0)  # type: ignore[arg-type]
        problem.prediction[2:, PART] = 0.0
        tensors, scalars = problem.tensors, problem.scalars
        places = Places(tensors, scalars, SLOW_EMA)
        places._on_cpu = on_cpu
        one = torch.ones((), dtype=torch.float64)
        table, skip = update_numbers(tensors, scalars, one), torch.tensor(False)
        rates = averaging_rates(problem.ledger, 0.5, one, one)
        _update(tensors, table, skip, rates, False, False, places)
        both.append(problem)
    both[1].assert_same(both[0])


@pytest.mark.parametrize("param", ["bf16", "fp16"])
def test_it_moves_no_byte(param: str) -> None:
    """The pass of its own that is gone moved 20; `test_audit` compiles what is counted here."""
    moved = {case.name: case.bytes_per_element for case in cases()}
    plain_step = f"adamw {param}, one launch, clip, slow EMA"
    assert moved[f"{plain_step}, accepting"] == moved[f"{plain_step}, unmeasured"] == 40
    assert moved[f"correct {param}, slow EMA"] == 20
    assert moved[f"lion {param}, one launch, clip, slow EMA, accepting"] == 32


def test_a_step_that_measures_or_has_no_slow_ema_places_nothing() -> None:
    problem = Problem(some(), precision=BF16)
    for options in ({"measured": True}, {"measured": False, "slow_beta": 0.0}):
        with pytest.raises(AssertionError, match="again"):
            KERNELS.step(problem, again=[SLOW_EMA], **options)
