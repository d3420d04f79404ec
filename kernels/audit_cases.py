"""Which launches are audited, with which constants, and what each is known to move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton_hybrid.kernels.audit_launches import (
    FP32,
    FP64,
    HALVES,
    MANY,
    SINGLE,
    WITHOUT_MASTERS,
    Precision,
    adamw_launch,
    correct_launch,
    gram_launch,
    judge_launch,
    muon_launch,
    muon_predict_launch,
    muon_update_launch,
    predict_launch,
    reduce_launch,
    settle_launch,
    slopes_launch,
)
from triton_hybrid.kernels.audit_targets import TYPE_NAMES, Launch, Target
from triton_hybrid.kernels.chunks import MAX_HISTORY


@dataclass(frozen=True)
class Case:
    """A launch to audit, and what it is known to move.

    The byte counts are those of one element in a full chunk, one entry a role.

    Attributes:
        name: As in the table.
        kernel: Which kernel, as on the command line.
        launch: Makes the launch for a target.
        reads: Item sizes of the roles that a block reads.
        writes: Item sizes of the roles that a block writes.
        first_pass: Item sizes of the roles that a pass of its own reads before.
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


def _adamw_case(
    precision: Precision,
    part: str = "one launch",
    *,
    clip: bool = False,
    slow: bool = False,
    measured: bool = True,
    lengths: Sequence[int] = MANY,
) -> Case:
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    words = [precision.name, part]
    words += ["clip"] * clip + ["slow EMA"] * slow + ["unmeasured"] * (slow and not measured)
    words += ["one chunk"] * (lengths is SINGLE)
    # weight, exp_avg, exp_avg_sq; the gradient; slow EMA and weight EMA
    extra = (wide, wide) * slow
    reads = precision.weights + (wide,) * 2 + (narrow,) + extra + (wide,) * slow
    writes = precision.stored + (wide,) * 2 + extra
    floor = 4 * wide + narrow + sum(precision.weights) + sum(precision.stored)
    launch = functools.partial(
        adamw_launch,
        precision=precision,
        lengths=lengths,
        part=part,
        clip=clip,
        slow=slow,
        measured=measured,
    )
    name = "adamw " + ", ".join(words)
    if part == "statistics":
        return Case(name, "adamw", launch, reads=(narrow,), floor=narrow)
    first = (narrow,) if part == "one launch" else ()
    return Case(
        name,
        "adamw",
        launch,
        reads,
        writes,
        first_pass=first,
        untaken=wide * slow,
        floor=floor,
        may_spill=precision == FP64,
    )


def _move_cases(precision: Precision, lengths: Sequence[int] = MANY) -> list[Case]:
    """Predict, settle, slopes, correct."""
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    common: dict[str, Any] = {"precision": precision, "lengths": lengths}
    name = precision.name + (", one chunk" if lengths is SINGLE else "")
    weight, move = precision.weights, precision.stored
    basis = (wide,) * MAX_HISTORY
    return [
        # Reads weight, exp_avg, exp_avg_sq, slow_ema and weight_ema; the bare move needs no
        # exp_avg and keeps no snapshot.
        Case(
            f"predict {name}, slow EMA",
            "predict",
            functools.partial(predict_launch, trajectory=False, **common),
            weight + (wide,) * 4,
            (wide, *move),
            floor=3 * wide + sum(weight) + sum(move),
        ),
        Case(
            f"predict {name}, trajectory of {MAX_HISTORY}",
            "predict",
            functools.partial(predict_launch, trajectory=True, **common),
            (*weight, wide, *basis),
            (wide, *move),
            floor=sum(weight) + sum(basis) + sum(move),
        ),
        Case(
            f"predict {name}, trajectory of {MAX_HISTORY} again",
            "predict",
            functools.partial(predict_launch, trajectory=True, again=True, **common),
            (*weight, *basis),
            move,
            floor=sum(weight) + sum(basis) + sum(move),
        ),
        Case(
            f"settle {name} (when it takes back)",
            "settle",
            functools.partial(settle_launch, **common),
            (wide,),
            move,
            floor=wide + sum(move),
        ),
        Case(
            f"slopes {name}",
            "slopes",
            functools.partial(slopes_launch, **common),
            (narrow, *weight, wide),
            floor=narrow + sum(weight) + wide,
        ),
        Case(
            f"correct {name}, restart",
            "correct",
            functools.partial(correct_launch, restart=True, **common),
            (*weight, wide),
            (wide, *move),
            floor=sum(weight) + wide + sum(move),
        ),
    ]


def _gram_case(slot: int, lengths: Sequence[int] = MANY, precision: Precision = FP32) -> Case:
    # The load of each row lies in a branch, but for the row known to be written; of a row
    # that is only known at run time, one branch is not taken.
    wide = FP32.weight.itemsize
    known = slot == 1
    rows = 1 + MAX_HISTORY - known
    moved = (1 + MAX_HISTORY - 1 + 2) * wide + sum(precision.weights)
    return Case(
        f"gram {precision.name}, history of {MAX_HISTORY}"
        + (", one chunk" if lengths is SINGLE else ""),
        "gram",
        functools.partial(gram_launch, precision=precision, lengths=lengths, slot=slot),
        precision.weights + (wide,) * rows,
        (wide, wide),
        untaken=0 if known else wide,
        floor=moved,
    )


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
        gather = functools.partial(
            muon_launch, precision=precision, products=torch.bfloat16, number=0
        )
        name = f"muon gather {precision.name}"
        found.append(Case(f"{name}, momentum", "muon", functools.partial(gather, source=None)))
        found.append(Case(f"{name}, row", "muon", functools.partial(gather, source="slow_ema")))
        wide, narrow, master = precision.weight.itemsize, precision.param.itemsize, precision.master
        half = torch.bfloat16.itemsize
        for slow, measured in ((False, False), (True, False), (True, True)):
            # weight and orthogonalised momentum; gradient, slow EMA, its orthogonalised one
            reads = (wide, half) + (narrow, wide) * slow + (half,) * measured
            writes = (wide, *master) + (wide,) * slow
            words = ", slow EMA" * slow + ", measured" * measured
            found.append(
                Case(
                    f"muon update {precision.name}{words}",
                    "muon",
                    functools.partial(
                        muon_update_launch, precision=precision, slow=slow, measured=measured
                    ),
                    reads,
                    writes,
                    floor=2 * wide + half + sum(master),
                )
            )
        # weight, exp_avg, orthogonalised slow EMA; weight, snapshot
        found.append(
            Case(
                f"muon predict {precision.name}",
                "muon",
                functools.partial(muon_predict_launch, precision=precision),
                (wide, wide, half),
                (wide, wide, *master),
                floor=2 * wide + half + sum(master),
            )
        )
    for dtype in (torch.bfloat16, torch.float32):
        launch = functools.partial(muon_launch, precision=FP32, products=dtype, source=None)
        normalise = functools.partial(launch, number=1)
        found.append(Case(f"muon normalise {TYPE_NAMES[dtype]}", "muon", normalise))
        for number, name in _PRODUCTS:
            words = f"muon product {TYPE_NAMES[dtype]}, {name}"
            product = functools.partial(launch, number=number)
            found.append(Case(words, "muon", product, products=True))
    return found


def cases() -> list[Case]:
    """Every launch to audit."""
    found: list[Case] = []
    for precision in (FP32, *HALVES):
        for clip in (True, False):
            found.append(_adamw_case(precision, clip=clip))
            found.append(_adamw_case(precision, clip=clip, slow=True))
        found.append(_adamw_case(precision, clip=True, slow=True, measured=False))
        found.append(_adamw_case(precision, "statistics"))
        found.append(_adamw_case(precision, "update", clip=True))
        found.append(_adamw_case(precision, "update", clip=True, slow=True))
    found.append(_adamw_case(FP32, clip=True, slow=True, lengths=SINGLE))
    found.append(_adamw_case(FP64, clip=True, slow=True))
    for precision in (FP32, *HALVES):
        found.extend(_move_cases(precision))
    found.extend(_move_cases(FP32, SINGLE))
    for precision in WITHOUT_MASTERS:
        found.append(_adamw_case(precision, clip=True, slow=True))
        found.append(_adamw_case(precision, "update", clip=True))
        found.extend(_move_cases(precision))
    found.append(_gram_case(slot=2))
    found.append(_gram_case(slot=2, precision=WITHOUT_MASTERS[0]))
    found.append(_gram_case(slot=1, lengths=SINGLE))
    found.extend(_muon_cases())
    found.append(Case("reduce", "reduce", reduce_launch))
    found.append(Case("judge", "judge", functools.partial(judge_launch, lengths=MANY)))
    found.append(
        Case("judge, one tensor", "judge", functools.partial(judge_launch, lengths=SINGLE))
    )
    return found
