"""The launches of predictions: predict, check, slopes, correct, and those at the end of a cycle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton_hybrid.kernels.audit.case import Case
from triton_hybrid.kernels.audit.problems import (
    MANY,
    SINGLE,
    Precision,
    Problem,
    Shapes,
    itemsize,
)
from triton_hybrid.kernels.audit.targets import Launch, Target, launches
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.fingerprint import fingerprint
from triton_hybrid.kernels.gram import gram
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.predict import predict
from triton_hybrid.kernels.rows import NONE, OWN
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.slopes import slopes
from triton_hybrid.kernels.trapezoid import base_slope
from triton_hybrid.kernels.verify import check_move, correct

from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.orthogonal import TURNED
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules.adamw import ADAMW
from triton_hybrid.rules.rule import Rule


def launch_of(
    number: int, call: Callable[[Problem], None], *problem: Any, **options: Any
) -> Callable[[Target], Launch]:
    """One of the launches, by number, that a call makes with a problem for the target."""
    return lambda target: launches(target, call, Problem(target, *problem, **options))[number]


def predict_case(
    rule: Rule,
    precision: Precision,
    displacement: Displacement,
    name: str,
    *,
    again: bool = False,
    shapes: Shapes | None = None,
) -> Case:
    """The pass of `predict` over all elements; ``again``: of a further step in a row."""
    wide, slow = precision.weight.itemsize, displacement.again
    slopes_known = again and not slow

    def call(problem: Problem) -> None:
        alone = None if slow else torch.zeros(len(problem.tensors))
        options: dict[str, Any] = {"first": not again, "with_slopes": not slopes_known}
        sets = (problem.tensors, problem.scalars)
        predict(*sets, displacement, alone, threshold=0.5, share=0.5, **options)

    vectors = (wide,) * len(displacement.reads)
    if displacement.along_rule:
        vectors += tuple(itemsize(rule, row, precision) for row in rule.kernels.reads_along)
    first_moment = (wide,) * (not slopes_known)
    lost = residue(precision) if slow else ()
    # What stands in the parameter alone is not written to the master behind.
    written = (precision.param.itemsize,) if slow and not lost else precision.weights
    # The bare move needs no exp_avg, and keeps nothing of what was there before.
    return Case(
        name,
        launch_of(-2, call, precision, rule, shapes),
        precision.weights + vectors + first_moment + lost * again,
        written + lost,
        floor=sum(precision.weights + vectors + written),
        may_park=slow,
    )


def residue(precision: Precision) -> tuple[int, ...]:
    """The byte of a weight that is moved in place."""
    in_place = precision.kept != OWN or precision.param == precision.weight
    return (torch.int8.itemsize,) * in_place


def move_cases(precision: Precision, shapes: Shapes = MANY) -> list[Case]:
    """Predict, check, slopes, gram, correct."""
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    name = precision.name + (", one chunk" if shapes is SINGLE else "")
    weights = precision.weights
    slow, last = SlowEMA.displacement, Linear.displacement
    linear = f"predict {name}, linear"

    def one_pass(
        title: str,
        launcher: Callable[..., None],
        reads: tuple[int, ...],
        writes: tuple[int, ...] = (),
        may_park: bool = False,
        **options: Any,
    ) -> Case:
        def call(problem: Problem) -> None:
            launcher(problem.tensors, problem.scalars, **options)

        launch = launch_of(0, call, precision, ADAMW, shapes)
        return Case(title, launch, reads, writes, floor=sum(reads + writes), may_park=may_park)

    def gram_of(tensors: TensorSet, scalars: Scalars) -> None:
        gram(tensors, scalars.ledger, scalars.sums[:, :2])

    def slope_of(tensors: TensorSet, scalars: Scalars) -> None:
        base_slope(tensors, scalars, scalars.hyperparameters)

    def fingerprint_of(tensors: TensorSet, scalars: Scalars) -> None:
        fingerprint(tensors, scalars.prediction[:, 4:])

    limits: dict[str, Any] = {"threshold": 0.5, "limit": 10.0, "cooldown": 5.0, "last": True}
    restarted, found = (wide, *weights), []
    # Slow EMA and second moment; the direction of matrices.
    kinds = [("slow EMA", slow, 2), ("matrices", TURNED, 1)]
    if shapes is SINGLE or precision.param == torch.float16:
        kinds.pop()  # as slow EMA but for a row less, and a compilation takes its time
    for words, displacement, rows in kinds:
        along = (*(wide,) * rows, *residue(precision))
        placed: dict[str, Any] = {"again": displacement}
        corrected: dict[str, Any] = {"restart": False, "deferred": True, **placed}
        looked_at = (*weights, *along)
        slopes_of = along if precision.kept != NONE else (*along, *weights)
        moved, kind = f"predict {name}, {words}", f"{name}, {words}"
        found += [
            predict_case(ADAMW, precision, displacement, moved, shapes=shapes),
            predict_case(
                ADAMW, precision, displacement, f"{moved} again", again=True, shapes=shapes
            ),
            one_pass(f"check {kind}", check_move, looked_at, weights, True, **limits, **placed),
            one_pass(f"slopes {kind}", slopes, (narrow, *slopes_of), may_park=True, **placed),
            one_pass(f"correct {kind}", correct, looked_at, weights, **corrected),
        ]
    return [
        *found,
        predict_case(ADAMW, precision, last, linear, shapes=shapes),
        predict_case(ADAMW, precision, last, f"{linear} again", again=True, shapes=shapes),
        one_pass(f"check {name} (when it rolls back)", check_move, (wide,), weights, **limits),
        one_pass(f"slopes {name}", slopes, (narrow, *weights, wide)),
        one_pass(f"base slope {name}", slope_of, (*weights, narrow, wide, wide)),
        one_pass(f"fingerprint {name}", fingerprint_of, (narrow,)),
        one_pass(f"gram {name}", gram_of, (*weights, wide, wide), (wide, wide)),
        one_pass(f"correct {name}, restart", correct, (*weights, wide), restarted, restart=True),
    ]
