"""Which launches are audited, with which constants, and what each is known to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton_hybrid.kernels.audit.launches import (
    FP32,
    FP64,
    HALVES,
    MANY,
    SINGLE,
    WITHOUT_MASTERS,
    Precision,
    Problem,
    Shapes,
    itemsize,
    launches,
)
from triton_hybrid.kernels.audit.targets import TYPE_NAMES, Launch, Target
from triton_hybrid.kernels.gram import gram, reduce_partials
from triton_hybrid.kernels.ledger import decide
from triton_hybrid.kernels.newton_schulz import orthogonalise
from triton_hybrid.kernels.predict import Displacement, predict
from triton_hybrid.kernels.step import step
from triton_hybrid.kernels.verify import check_move, correct, slopes

from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules import RULES
from triton_hybrid.rules.rule import Rule

ADAMW, MUON = RULES["adamw"], RULES["muon"]


@dataclass(frozen=True)
class Case:
    """A launch to audit, and what it is known to move.

    The byte counts are those of one element in a full chunk, one entry a row.

    Attributes:
        name: As in the table.
        kernel: Which kernel, as on the command line.
        launch: Makes the launch for a target.
        reads: Item sizes of the rows that a block reads.
        writes: Item sizes of the rows that a block writes.
        first_pass: Item sizes of the rows that a pass of its own reads before.
        untaken: Bytes among ``reads`` in branches of which one is not taken, or read once more
            while they are in cache.
        floor: Bytes that the bare operation has to move; None where elements are not moved.
        may_spill: Whether spills are shown only. True for FP64, which nobody trains with: it
            has to run, not to be fast.
        products: Whether it multiplies matrices; then all its tiles must come by accesses of
            128 bits.
    """

    name: str
    kernel: str
    launch: Callable[[Target], Launch]
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    first_pass: tuple[int, ...] = ()
    untaken: int = 0
    floor: int | None = None
    may_spill: bool = False
    products: bool = False

    @property
    def bytes_per_element(self) -> int | None:
        """Bytes that the kernel moves for an element; None where it moves none."""
        total = sum(self.reads) + sum(self.writes) + sum(self.first_pass) - self.untaken
        return total or None


def _step_case(
    rule: Rule,
    precision: Precision,
    part: str = "one launch",
    *,
    clip: bool = False,
    slow: bool = False,
    measured: bool = True,
    shapes: Shapes | None = None,
) -> Case:
    """One launch of `step`, or its part ``statistics`` or ``update``."""
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    kernels = rule.kernels
    words = [precision.name, part]
    words += ["clip"] * clip + ["slow EMA"] * slow + ["unmeasured"] * (slow and not measured)
    words += ["one chunk"] * (shapes is SINGLE)
    name = f"{rule.name} {', '.join(words)}"

    def launch(target: Target) -> Launch:
        problem = Problem(target, precision, rule, shapes)
        found = launches(
            target,
            step,
            [problem.tensors],
            problem.scalars,
            max_norm=1.0 if clip else None,
            slow_beta=0.9 if slow else 0.0,
            observed=True,
            measured=measured,
            cooperative=part == "one launch",
        )
        return found[-1 if part == "update" else 0]

    if part == "statistics":
        return Case(name, rule.name, launch, reads=(narrow,), floor=narrow)
    own = tuple(itemsize(rule, row, precision) for row in kernels.reads)
    written = tuple(itemsize(rule, row, precision) for row in kernels.writes)
    gradient = (narrow,) * (kernels.uses_gradient or slow)
    extra = (wide,) * slow
    along = tuple(itemsize(rule, row.name, precision) for row in rule.along_rows)
    bare = own + written + precision.weights + precision.stored
    return Case(
        name,
        rule.name,
        launch,
        precision.weights + own + gradient + extra + along * (slow and measured),
        precision.stored + written + extra,
        first_pass=(narrow,) if part == "one launch" else (),
        floor=sum(bare) + narrow * kernels.uses_gradient,
        may_spill=precision == FP64,
    )


def _predict_case(
    rule: Rule,
    precision: Precision,
    displacement: Displacement,
    words: str,
    *,
    again: bool = False,
    shapes: Shapes | None = None,
) -> Case:
    """The pass of `predict` over all elements; ``again``: without slopes and snapshot."""
    wide = precision.weight.itemsize

    def launch(target: Target) -> Launch:
        problem = Problem(target, precision, rule, shapes)
        alone = torch.zeros(len(problem.tensors))
        found = launches(
            target,
            predict,
            problem.tensors,
            problem.scalars,
            displacement,
            None if displacement.along_rule else alone,
            threshold=0.5,
            share=0.5,
            save=not again,
            with_slopes=not again,
        )
        return found[-2]

    # The slow EMA itself is not read where the rule has prepared its direction.
    uses_gradient = rule.kernels.uses_gradient
    vectors = (wide,) * (uses_gradient or not displacement.along_rule)
    if displacement.along_rule:
        vectors += tuple(itemsize(rule, row, precision) for row in rule.kernels.reads_along)
    saved = (wide,) * (not again)
    # The bare move needs no exp_avg and keeps no snapshot.
    return Case(
        f"{words}",
        "predict" if uses_gradient else rule.name,
        launch,
        precision.weights + vectors + saved,
        saved + precision.stored,
        floor=sum(precision.weights + vectors + precision.stored),
    )


def _pass_case(
    words: str,
    kernel: str,
    function: Callable[..., Any],
    reads: tuple[int, ...],
    writes: tuple[int, ...],
    precision: Precision,
    shapes: Shapes,
    *,
    untaken: int = 0,
    **options: Any,
) -> Case:
    """A launcher that takes tensors, scalars and options; its first launch."""

    def launch(target: Target) -> Launch:
        problem = Problem(target, precision, ADAMW, shapes)
        return launches(target, function, problem.tensors, problem.scalars, **options)[0]

    floor = sum(reads) + sum(writes) - untaken
    return Case(words, kernel, launch, reads, writes, untaken=untaken, floor=floor)


def _move_cases(precision: Precision, shapes: Shapes = MANY) -> list[Case]:
    """Predict, check, slopes, correct."""
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    name = precision.name + (", one chunk" if shapes is SINGLE else "")
    common = (precision, shapes)
    limits: dict[str, Any] = {"threshold": 0.5, "limit": 10.0, "cooldown": 5.0, "last": True}
    slow, last = SlowEMA.displacement, Linear.displacement
    words = f"predict {name}, linear"
    return [
        _predict_case(ADAMW, precision, slow, f"predict {name}, slow EMA", shapes=shapes),
        _predict_case(ADAMW, precision, last, words, shapes=shapes),
        _predict_case(ADAMW, precision, last, f"{words} again", again=True, shapes=shapes),
        _pass_case(
            f"check {name} (when it rolls back)",
            "check",
            check_move,
            (wide,),
            precision.stored,
            *common,
            **limits,
        ),
        _pass_case(
            f"slopes {name}", "slopes", slopes, (narrow, *precision.weights, wide), (), *common
        ),
        _pass_case(
            f"gram {name}",
            "gram",
            lambda tensors, scalars: gram(tensors, scalars.sums[:, :2]),
            (*precision.weights, wide, wide),
            (wide, wide),
            *common,
        ),
        _pass_case(
            f"correct {name}, restart",
            "correct",
            correct,
            (*precision.weights, wide),
            (wide, *precision.stored),
            *common,
            restart=True,
        ),
    ]


def _orthogonalise_case(
    words: str, precision: Precision, products: str, number: int, source: str | None, tiles: bool
) -> Case:
    """One of the launches of `orthogonalise`; ``source`` None takes the momentum."""

    def launch(target: Target) -> Launch:
        problem = Problem(target, precision, MUON, products=products)
        assert problem.tensors.matrices is not None
        arguments = (problem.tensors.matrices, problem.scalars, "update")
        return launches(target, orthogonalise, *arguments, source=source, max_norm=1.0)[number]

    return Case(f"muon {words}", "muon", launch, products=tiles)


# Launches of `orthogonalise` by number: gather, normalise, then three for each of three steps.
_PRODUCTS = (
    (2, "X Xᵀ"),
    (3, "b A + c A A"),
    (4, "a X + B X"),
    (10, "a X + B X, last step"),
)


def _muon_cases() -> list[Case]:
    """The matrix products, and what Muon changes in the bandwidth kernels."""
    found = []
    for precision in (FP32, *HALVES):
        for words, source in (("momentum", None), ("row", "slow_ema")):
            name = f"gather {precision.name}, {words}"
            found.append(_orthogonalise_case(name, precision, "bfloat16", 0, source, False))
        for slow, measured in ((False, False), (True, False), (True, True)):
            found.append(
                _step_case(MUON, precision, "update", clip=True, slow=slow, measured=measured)
            )
        words = f"muon predict {precision.name}"
        found.append(_predict_case(MUON, precision, SlowEMA.displacement, words))
    for name in ("bfloat16", "float32"):
        short = TYPE_NAMES[getattr(torch, name)]
        found.append(_orthogonalise_case(f"normalise {short}", FP32, name, 1, None, False))
        for number, words in _PRODUCTS:
            title = f"product {short}, {words}"
            found.append(_orthogonalise_case(title, FP32, name, number, None, True))
    return found


def _single_cases() -> list[Case]:
    """Kernels of one program, which move no elements."""

    def reduce(target: Target) -> Launch:
        problem = Problem(target, FP32, ADAMW)
        chunks = problem.tensors.chunks(every=True)
        return launches(
            target, reduce_partials, torch.zeros(chunks.count, 3), chunks, problem.scalars.sums
        )[0]

    def decide_for(shapes: Shapes) -> Callable[[Target], Launch]:
        return lambda target: launches(
            target, decide, Problem(target, FP32, ADAMW, shapes).scalars, 2.5, 5.0
        )[0]

    return [
        Case("reduce", "reduce", reduce),
        Case("decide", "decide", decide_for(MANY)),
        Case("decide, one tensor", "decide", decide_for(SINGLE)),
    ]


def _rule_cases(rule: Rule) -> list[Case]:
    """The update of a rule that prepares nothing, and predictions along it."""
    found = []
    for precision in (FP32, *HALVES):
        for slow in (False, True):
            found.append(_step_case(rule, precision, clip=True, slow=slow))
        words = f"{rule.name} predict {precision.name}"
        found.append(_predict_case(rule, precision, SlowEMA.displacement, words))
    return found


def cases() -> list[Case]:
    """Every launch to audit."""
    found: list[Case] = []
    for precision in (FP32, *HALVES):
        for clip in (True, False):
            found.append(_step_case(ADAMW, precision, clip=clip))
            found.append(_step_case(ADAMW, precision, clip=clip, slow=True))
        found.append(_step_case(ADAMW, precision, clip=True, slow=True, measured=False))
        found.append(_step_case(ADAMW, precision, "statistics"))
        found.append(_step_case(ADAMW, precision, "update", clip=True))
        found.append(_step_case(ADAMW, precision, "update", clip=True, slow=True))
    found.append(_step_case(ADAMW, FP32, clip=True, slow=True, shapes=SINGLE))
    found.append(_step_case(ADAMW, FP64, clip=True, slow=True))
    for precision in (FP32, *HALVES):
        found.extend(_move_cases(precision))
    found.extend(_move_cases(FP32, SINGLE))
    for precision in WITHOUT_MASTERS:
        found.append(_step_case(ADAMW, precision, clip=True, slow=True))
        found.append(_step_case(ADAMW, precision, "update", clip=True))
        found.extend(_move_cases(precision))
    found.extend(_muon_cases())
    for rule in RULES.values():
        if rule not in (ADAMW, MUON):
            found.extend(_rule_cases(rule))
    return found + _single_cases()
