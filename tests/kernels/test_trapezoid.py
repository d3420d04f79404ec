"""The slope along the last base step, and what is concluded from two of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from kernel_launches import BACKENDS, KERNELS, PLAIN, Checked, counted_launches
from kernel_memory import DEVICE, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import THREE, fewer, some
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, new_ledger
from triton_hybrid.kernels.scalars import HYPER
from triton_hybrid.kernels.trapezoid import WATCH, begin_step, compare, end_step, new_watch


def slopes(problem: Problem) -> Tensor:
    """Gradient times step of every element, in FP64 by the definition of AdamW."""
    found = [torch.zeros(1, dtype=torch.float64, device=DEVICE)]
    for index, spec in enumerate(problem.specs):
        if not spec.present:
            continue
        row = dict(zip(HYPER, problem.scalars.hyperparameters[spec.group].tolist()))
        w, g, m, v = (
            problem.values(name)[index].double()
            for name in ("weight", "grad", "exp_avg", "exp_avg_sq")
        )
        step = max(spec.step, 1)
        m = m / (1.0 - math.exp(step * row["log_exp_avg"]))
        v = v / (1.0 - math.exp(step * row["log_beta2"]))
        update, decay = row["lr"] * m / (v.sqrt() + row["eps"]), row["lr"] * row["weight_decay"]
        before = (w + update) / (1.0 - decay)
        found.append((row["sign"] / 4.0 * g * (w - before)).flatten())
    return torch.cat(found)


@fewer(8)
@given(make=problems(max_size=3, groups=3, absent=True, filled=True))
def test_the_slope_is_that_of_the_definition(make: Make) -> None:
    for backend in (KERNELS, PLAIN):
        problem = make().note(loss_scale=4.0)
        expected = slopes(problem)
        slack = 1e-5 * float(expected.abs().sum()) + 1e-9
        assert float(backend.base_slope(problem)) == pytest.approx(
            float(expected.sum()), rel=0, abs=slack
        )


@BACKENDS
def test_it_repeats_bit_for_bit(backend: Checked) -> None:
    first, second = (backend.base_slope(Problem(some(), tiling=THREE)) for _ in "ab")
    assert_same_bits(first, second, "slope")


def test_two_launches() -> None:
    with counted_launches() as log:
        KERNELS.base_slope(Problem(some()))
    assert log == ["_slope_kernel", "_reduce_kernel"]


def looked(before: float, after: float, *losses: float, applied: bool = True) -> dict[str, float]:
    """A watch after one step with these slopes and losses."""
    ledger, watch = new_ledger(DEVICE), new_watch(DEVICE)
    ledger[INDEX["loss"]] = losses[0]
    begin_step(watch, ledger)
    ledger[INDEX["applied"]] += applied
    wide = {"dtype": torch.float64, "device": DEVICE}
    end_step(watch, ledger, torch.tensor(before, **wide))  # type: ignore[call-overload]
    ledger[INDEX["loss"]] = losses[1]
    compare(watch, ledger, torch.tensor(after, **wide))  # type: ignore[call-overload]
    return dict(zip(WATCH, watch.tolist()))


@pytest.mark.parametrize(
    ("before", "after", "losses", "quiet"),
    [
        (-1.0, -0.5, (3.0, 2.25), 1.0),  # the trapezoid itself
        (-1.0, -0.5, (3.0, 2.25 + 0.012), 1.0),  # a twentieth of the bend is 0.0125
        (-1.0, -0.5, (3.0, 2.25 + 0.013), 0.0),
        (-1.0, -0.99, (3.0, 2.005 + 0.0029), 1.0),  # no bend: 0.3% of the change
        (-1.0, -0.99, (3.0, 2.005 + 0.0031), 0.0),
        (0.0, 0.0, (3.0, 3.0), 1.0),  # at a learning rate of 0
        (0.0, 0.0, (3.0, 3.001), 0.0),
    ],
)
def test_how_far_a_trapezoid_may_be_off(
    before: float, after: float, losses: tuple[float, float], quiet: float
) -> None:
    found = looked(before, after, *losses)
    assert (found["quiet_share"], found["quiet_steps"], found["looked_at"]) == (quiet, 1.0, 1.0)


@pytest.mark.parametrize("case", ["no loss", "not made", "infinite"])
def test_what_is_not_known_does_not_count(case: str) -> None:
    losses = {"no loss": (3.0, math.nan), "infinite": (math.inf, 2.0)}.get(case, (3.0, 2.25))
    found = looked(-1.0, -0.5, *losses, applied=case != "not made")
    assert (found["quiet_share"], found["quiet_steps"], found["looked_at"]) == (0.0, 0.0, 1.0)
