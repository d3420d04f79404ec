"""Which launches are audited, with which constants, and what each is known to move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton_hybrid.kernels.audit.case import Case
from triton_hybrid.kernels.audit.moves import launch_of, move_cases, predict_case
from triton_hybrid.kernels.audit.problems import (
    FP32,
    FP64,
    HALVES,
    SINGLE,
    WITHOUT_MASTERS,
    Precision,
    Problem,
    Shapes,
    itemsize,
)
from triton_hybrid.kernels.audit.targets import TYPE_NAMES
from triton_hybrid.kernels.direction import DIRECTION, lengthen
from triton_hybrid.kernels.direction import along as see_along
from triton_hybrid.kernels.fingerprint import find_writes, note_weights
from triton_hybrid.kernels.launch import start
from triton_hybrid.kernels.ledger import decide
from triton_hybrid.kernels.newton_schulz import orthogonalise, orthogonalise_row
from triton_hybrid.kernels.secant import move, products_size, settle
from triton_hybrid.kernels.secant import products as pair_products
from triton_hybrid.kernels.shift import shift
from triton_hybrid.kernels.step import step
from triton_hybrid.kernels.sums import reduce_partials
from triton_hybrid.kernels.trial import TRIAL

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.orthogonal import TURNED
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules import RULES
from triton_hybrid.rules.adamw import ADAMW
from triton_hybrid.rules.rule import Rule

__all__ = ["Case", "cases"]

MUON = RULES["muon"]


def _step_case(
    rule: Rule,
    precision: Precision,
    part: str = "one launch",
    *,
    clip: bool = False,
    slow: bool = False,
    measured: bool = True,
    accepting: bool = False,
    turned: bool = False,
    shapes: Shapes | None = None,
) -> Case:
    """One launch of `step` or a part of it.

    ``accepting``: where masters follow a prediction; ``turned``: of matrices, without a slow EMA.
    """
    averaged, measured = slow or accepting or turned, measured and not accepting
    slow = averaged and not turned
    without = ("slow_ema",) if turned else ()
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    kernels = rule.kernels
    words = [precision.name, part]
    words += ["clip"] * clip + ["slow EMA"] * slow
    words += ["matrices"] * turned
    words += ["accepting" if accepting else "unmeasured"] * (averaged and not measured)
    words += ["one chunk"] * (shapes is SINGLE)
    name = f"{rule.name} {', '.join(words)}"

    def call(problem: Problem) -> None:
        step(
            [problem.tensors],
            problem.scalars,
            max_norm=1.0 if clip else None,
            slow_beta=0.9 if averaged else 0.0,
            observed=True,
            measured=measured,
            cooperative=part == "one launch",
            again=(TURNED if turned else SlowEMA.displacement,) if accepting else None,
        )

    number = -1 if part == "update" else 0
    launch = launch_of(number, call, precision, rule, shapes, without=without)
    if part == "statistics":
        return Case(name, launch, reads=(narrow,), floor=narrow)
    own = tuple(itemsize(rule, row, precision) for row in kernels.reads)
    written = tuple(itemsize(rule, row, precision) for row in kernels.writes)
    gradient = (narrow,) * (kernels.uses_gradient or slow)
    extra = (wide,) * slow
    along = (wide,) * (turned and accepting)  # exp_avg before the update is read anyway
    bare = own + written + precision.weights + precision.weights
    return Case(
        name,
        launch,
        precision.weights + own + gradient + extra + along,
        precision.weights + written + extra,
        first_pass=(narrow,) if part == "one launch" else (),
        floor=sum(bare) + narrow * kernels.uses_gradient,
        may_spill=precision == FP64,
        may_park=averaged,
        pieces=2 if accepting else 1,
    )


def _secant_cases(precision: Precision) -> list[Case]:
    """The passes of a quasi-Newton move, with as many pairs as there are by default."""
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    weights, history = precision.weights, HybridConfig().history

    def case(
        name: str,
        launcher: Callable[..., None],
        size: int,
        reads: tuple[int, ...] = (),
        writes: tuple[int, ...] = (),
        inner: tuple[int, ...] = (),
        **counted: Any,
    ) -> Case:
        def call(problem: Problem) -> None:
            numbers = torch.zeros(size, dtype=torch.float64)
            trial = () if launcher is settle else (torch.zeros(len(TRIAL), dtype=torch.float64),)
            launcher(problem.tensors, problem.scalars, *trial, numbers, history)

        launch = launch_of(0, call, precision, ADAMW)
        floor = sum(reads + writes + inner * history) or None
        name = f"secant {name} {precision.name}"
        return Case(name, launch, reads, writes, inner, times=history, floor=floor, **counted)

    # Every pair once, the gradient and what its metric and the slopes need; in a cache after that
    # the changes, for the metric and for each column of the products, and the rows that fill up a
    # power of two.
    pairs: dict[str, Any] = {"on_paper": sum(weights) + 3 * wide + 2 * wide * history}
    padding = 2 * (triton.next_power_of_2(history) - history)
    pairs["repeats"] = wide * (padding + 2 * history + 1)

    def move_on(problem: Problem) -> None:
        shift(problem.tensors, problem.scalars, torch.zeros(3, dtype=torch.float64))

    name, launch = f"secant shift {precision.name}", launch_of(0, move_on, precision, ADAMW)
    floor = 2 * sum(weights) + 2 * wide
    return [
        Case(name, launch, (*weights, wide, wide), weights, floor=floor),
        case("settle", settle, 4, (*weights, wide, narrow, wide), (*(wide,) * 4, *weights)),
        case("products", pair_products, products_size(history), **pairs),
        case("move", move, 3 + 2 * history, (*weights, wide, wide), weights, (wide, wide)),
    ]


def _orthogonalise_case(
    words: str, number: int, precision: Precision, products: str, slow: bool = True,
    row: bool = False,
) -> Case:  # fmt: skip
    """One of the launches of `orthogonalise`, or of `orthogonalise_row`.

    ``slow``: the slow EMA takes part.
    """

    def call(problem: Problem) -> None:
        tensors, matrices = problem.tensors, problem.tensors.matrices
        assert matrices is not None
        if not slow:
            del tensors.dtype["slow_ema"]
        if row:
            start(orthogonalise_row(matrices, problem.scalars, DIRECTION), tensors.device)
        else:
            orthogonalise(tensors, problem.scalars, matrices, 1.0)

    launch = launch_of(number, call, precision, MUON, products=products)
    size, wide = getattr(torch, products).itemsize, precision.weight.itemsize
    # Gathered: the gradient, exp_avg read and written, the matrix. Divided, or of two operands: it.
    gathered = size + (wide if row else precision.param.itemsize + (2 + slow) * wide)
    moved = 2 * size if number else gathered
    return Case(f"muon {words}", launch, products=number > 1, on_paper=moved)


# Launches of `orthogonalise` by number: gather, normalise, then three for each of three steps.
_PRODUCTS = {
    1: "normalise {}",
    2: "product {}, X Xᵀ",
    3: "product {}, b A + c A A",
    4: "product {}, a X + B X",
    10: "product {}, a X + B X, last step",
}


def _muon_cases() -> list[Case]:
    """The matrix products, and what Muon changes in the bandwidth kernels."""
    found = []
    for precision in (FP32, *HALVES):
        for slow in (False, True):
            name = f"gather {precision.name}" + ", slow EMA" * slow
            found.append(_orthogonalise_case(name, 0, precision, "bfloat16", slow))
            found.append(_step_case(MUON, precision, "update", clip=True, slow=slow))
        name = f"muon predict {precision.name}, linear"
        found.append(predict_case(MUON, precision, Linear.displacement, name))
    for products in ("bfloat16", "float32"):
        short = TYPE_NAMES[getattr(torch, products)]
        for number, words in _PRODUCTS.items():
            found.append(_orthogonalise_case(words.format(short), number, FP32, products))
        for number, words in ((0, "take {}"), (10, "product {}, last step to a row")):
            found.append(_orthogonalise_case(words.format(short), number, FP32, products, row=True))
    return found


def _single_cases() -> list[Case]:
    """Kernels of one program, which move no elements, and one that never sees a weight."""

    def reduce(problem: Problem) -> None:
        chunks = problem.tensors.chunks(every=True)
        reduce_partials(torch.zeros(chunks.count, 3), chunks, problem.scalars.sums)

    def decide_all(problem: Problem) -> None:
        decide(problem.scalars, 2.5, 5.0)

    def see(problem: Problem) -> None:
        see_along(problem.tensors, problem.scalars)

    def turn(problem: Problem) -> None:
        lengthen(problem.tensors, problem.scalars, torch.zeros(len(problem.tensors)))

    def find(problem: Problem) -> None:
        find_writes([problem.tensors], problem.scalars)

    def note(problem: Problem) -> None:
        note_weights([problem.tensors], problem.scalars, every=False)

    return [
        Case("direction fp32", launch_of(0, see, FP32, ADAMW), (4, 4), (4,), floor=12),
        Case("direction fp32, at length", launch_of(0, turn, FP32, ADAMW), (4, 4), (4,), floor=12),
        Case("settle, find writes", launch_of(-1, find, FP32, ADAMW)),
        Case("settle, note weights", launch_of(-1, note, FP32, ADAMW)),
        Case("reduce", launch_of(0, reduce, FP32, ADAMW)),
        Case("decide", launch_of(0, decide_all, FP32, ADAMW)),
        Case("decide, one tensor", launch_of(0, decide_all, FP32, ADAMW, SINGLE)),
    ]


def _rule_cases(rule: Rule) -> list[Case]:
    """The update of a rule that prepares nothing, and predictions along it."""
    found = []
    for precision in (FP32, *HALVES):
        for slow in (False, True):
            found.append(_step_case(rule, precision, clip=True, slow=slow))
        if precision in HALVES:
            found.append(_step_case(rule, precision, clip=True, accepting=True))
        name = f"{rule.name} predict {precision.name}"
        found.append(predict_case(rule, precision, SlowEMA.displacement, name))
    return found


def cases() -> list[Case]:
    """Every launch to audit."""
    found: list[Case] = []
    for precision in (FP32, *HALVES):
        for clip in (True, False):
            for slow in (False, True):
                found.append(_step_case(ADAMW, precision, clip=clip, slow=slow))
        found.append(_step_case(ADAMW, precision, clip=True, slow=True, measured=False))
        found.append(_step_case(ADAMW, precision, "statistics"))
        found.append(_step_case(ADAMW, precision, clip=True, turned=True))
        for part in ("one launch", "update") if precision in HALVES else ():
            for turned in (False, True):
                options: Any = {"clip": True, "accepting": True, "turned": turned}
                found.append(_step_case(ADAMW, precision, part, **options))
        for slow in (False, True):
            found.append(_step_case(ADAMW, precision, "update", clip=True, slow=slow))
    found.append(_step_case(ADAMW, FP32, clip=True, slow=True, shapes=SINGLE))
    found.append(_step_case(ADAMW, FP64, clip=True, slow=True))
    for precision in (FP32, *HALVES):
        found.extend(move_cases(precision))
    found.extend(move_cases(FP32, SINGLE))
    for precision in WITHOUT_MASTERS:
        found.append(_step_case(ADAMW, precision, clip=True, slow=True))
        found.append(_step_case(ADAMW, precision, "update", clip=True))
        found.extend(move_cases(precision))
    for precision in (FP32, *HALVES):
        found.extend(_secant_cases(precision))
    found.extend(_muon_cases())
    for rule in RULES.values():
        if rule not in (ADAMW, MUON):
            found.extend(_rule_cases(rule))
    return found + _single_cases()
