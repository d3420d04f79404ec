"""The programs on the ledger leave the same bits in Python's numbers and in torch's."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_hybrid.kernels import scalar_math
from triton_hybrid.kernels.ledger import INDEX, write_ledger
from triton_hybrid.kernels.ledger_torch import (
    entries_of,
    gate_torch,
    move_loss_scale_torch,
    observe_torch,
    reject_torch,
    slow_share_torch,
)
from triton_hybrid.kernels.trial import TRIAL, judge, limit, new_trial

CPU = torch.device("cpu")
ODD = (0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 5e-324, 1e308, 0.999)
NUMBERS = st.floats() | st.sampled_from(ODD)
SMALL = st.integers(0, 12).map(float)
FLAGS = ("nonfinite", "found_inf", "moved", "written", "hold")
COUNTS = ("rejections", "cooldown", "stretch", "blocked", "norm_count", "loss_count", "slow_count")


def tensor(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def same(left: Any, right: Any) -> bool:
    """Whether a number of each kind has the same bits; any NaN is any other."""
    a, b = float(left), float(right)
    return (a != a and b != b) or struct.pack("d", a) == struct.pack("d", b)


@pytest.mark.parametrize("name", ["sqrt", "log", "exp", "reciprocal", "rounded", "finite"])
@given(x=NUMBERS)
def test_functions_of_one(name: str, x: float) -> None:
    function = getattr(scalar_math, name)
    for its in (x, *ODD):
        assert same(function(its), function(tensor(its))), its


@pytest.mark.parametrize("name", ["smaller", "larger", "divide"])
@given(x=NUMBERS, y=NUMBERS)
def test_functions_of_two(name: str, x: float, y: float) -> None:
    function = getattr(scalar_math, name)
    found, expected = function(x, y), function(tensor(x), tensor(y))
    assert same(found, expected) or found == float(expected) == 0.0  # of 0 and -0 torch takes any


@given(x=NUMBERS, low=st.floats(-2.0, 0.5), high=st.floats(0.5, 2.0))
def test_clamp(x: float, low: float, high: float) -> None:
    assert same(scalar_math.clamp(x, low, high), scalar_math.clamp(tensor(x), low, high))
    assert same(scalar_math.clamp(x, most=high), scalar_math.clamp(tensor(x), most=high))


@st.composite
def ledgers(draw: st.DrawFn) -> Tensor:
    """A ledger of what may stand there, and of some that may not."""
    values = {name: draw(NUMBERS) for name in INDEX}
    values |= {name: float(draw(st.booleans())) for name in FLAGS}
    values |= {name: draw(SMALL) for name in COUNTS}
    values["loss_scale"] = draw(st.sampled_from((1.0, 65536.0, 2.0**127, 2.0**-149)))
    values["growth_tracker"] = draw(st.sampled_from((-1.0, 0.0, 1999.0)))
    return write_ledger(values, CPU)


def both(program: Callable[[Tensor], Any], ledger: Tensor) -> None:
    """Runs a program in Python's numbers and in torch's: the same must come out."""
    results = []
    for in_torch in (False, True):
        mine = ledger.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scalar_math, "capturing", lambda _, found=in_torch: found)
            out = program(mine)
        extra = out.tolist() if isinstance(out, Tensor) else [] if out is None else [out]
        results.append([*mine.tolist(), *extra])
    for place, pair in enumerate(zip(*results, strict=True)):
        assert same(*pair) or pair[0] == pair[1] == 0.0, (place, [*INDEX][place : place + 1], pair)


def on_entries(program: Callable[[dict[str, Any]], Any]) -> Callable[[Tensor], Any]:
    def run(ledger: Tensor) -> Any:
        entries = entries_of(ledger)
        out = program(entries)
        scalar_math.write(ledger, entries)
        return None if out is None else float(out)

    return run


@given(ledger=ledgers(), numbers=st.lists(NUMBERS, min_size=6, max_size=6), applied=st.booleans())
def test_programs_of_a_step(ledger: Tensor, numbers: list[float], applied: bool) -> None:
    norm, used, *sums = numbers

    def observe(entries: dict[str, Any]) -> None:
        given = scalar_math.numbers_of(
            torch.tensor([norm, used, *sums, applied * 1.0], dtype=torch.float64)
        )
        observe_torch(entries, given[0], given[1], given[2:6], 0.9, given[6] > 0)

    both(on_entries(observe), ledger)
    bad = (entries_of(ledger)["nonfinite"] or 0.0) > 0
    both(on_entries(lambda its: move_loss_scale_torch(its, its["norm_count"] * 0.0 != bad)), ledger)
    both(on_entries(lambda its: gate_torch(its, 0.3)), ledger)
    both(on_entries(lambda its: reject_torch(its, 5.0, its["moved"] > 0)), ledger)
    both(on_entries(lambda its: slow_share_torch(its, its["norm"], its["horizon"])), ledger)


@given(
    ledger=ledgers(),
    trial=st.tuples(*[SMALL] * 3, NUMBERS, NUMBERS, SMALL, *[st.sampled_from((0.0, 1.0))] * 3),
    sums=st.lists(NUMBERS, min_size=6, max_size=6),
    last=st.booleans(),
)
def test_programs_of_a_trial(
    ledger: Tensor, trial: tuple[float, ...], sums: list[float], last: bool
) -> None:
    table = torch.tensor(sums, dtype=torch.float64).view(2, 3)

    def judged(mine: Tensor) -> Tensor:
        its = new_trial(CPU, dict(zip(TRIAL, trial)))
        orders = judge(mine, its, table, last=last, cooldown=5.0, history=3)
        return torch.cat([orders, its])

    def limited(mine: Tensor) -> Tensor:
        its = new_trial(CPU, dict(zip(TRIAL, trial)))
        orders = limit(mine, its, table, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), 5.0)
        return torch.cat([orders, its])

    both(judged, ledger)
    both(limited, ledger)
