"""What holds for every launch, whatever it computes: any list of tensors, always the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import KERNELS, PLAIN, RUN, Checked, counted_launches
from kernel_memory import assert_same_bits
from kernel_problems import Problem, problems
from kernel_specs import BF16, FP32, ON_GPU, ONE, PRECISIONS, TILINGS, Precision, fewer, plain, some
from torch import Tensor
from triton_hybrid.kernels.launch import Tiling

from triton_hybrid.rules import RULES


@dataclass(frozen=True)
class Operation:
    """What is done with a problem, and the kernels that it launches."""

    name: str
    kernels: Sequence[str]
    rule: str = "adamw"

    def __str__(self) -> str:
        return f"{self.name} {self.rule}"

    def on(self, *given: Any, backend: Checked = KERNELS, **options: Any) -> Problem:
        """A problem after it."""
        problem = Problem(*given, **{**options, "rule": self.rule})
        problem.returned = RUN[self.name](backend, problem)
        return problem


STEP, MOVE = ["_step_kernel"], ["_predict_kernel", "_reduce_kernel"]
SYMMETRIC, POLYNOMIAL = "_symmetric_kernel", "_polynomial_kernel"
ORTHOGONALISE = ["_gather_kernel", "_normalise_kernel", *[SYMMETRIC, SYMMETRIC, POLYNOMIAL] * 2]
BLOCKWISE = [
    *(Operation("step", STEP, name) for name, rule in RULES.items() if rule.bind is None),
    *(Operation("predict", MOVE, name) for name, rule in RULES.items() if rule.bind is None),
    Operation("predict linear", MOVE),
    Operation("roll back", [*MOVE, "_check_move_kernel"]),
    Operation("slopes", ["_slopes_kernel", "_reduce_kernel"]),
    Operation("correct", ["_correct_kernel"]),
    Operation("gram", ["_gram_kernel", "_reduce_kernel"]),
]
OPERATIONS = [
    *BLOCKWISE,
    Operation("step", [*STEP, *ORTHOGONALISE, *STEP], "muon"),
]


@pytest.mark.parametrize(
    ("operation", "backend"),
    # Torch multiplies many matrices at once in another order.
    [*((op, KERNELS) for op in OPERATIONS), *((op, PLAIN) for op in BLOCKWISE)],
    ids=str,
)
@fewer(3)
@given(data=st.data())
def test_many_tensors_in_one_launch_are_each_alone_in_any_order(
    operation: Operation, backend: Checked, data: st.DataObject
) -> None:
    make = data.draw(problems(operation.rule, min_size=2, max_size=3, groups=3, absent=True))
    together = operation.on(*make.args, backend=backend, **make.keywords)
    order = data.draw(st.permutations(range(len(together.specs))), label="order")
    tiling = replace(together.tensors.tiling, programs=1)
    for indices in (order, *([index] for index in order)):
        specs = [together.specs[index] for index in indices]
        again = operation.on(specs, **{**make.keywords, "tiling": tiling, "backend": backend})
        # Torch's sums may depend on where in memory a tensor lies.
        again.assert_same(together, indices, rows=again.state if backend is PLAIN else ())


SECANT = [Operation(name, ()) for name in ("base slope", "products", "move", "settle")]


@pytest.mark.parametrize(
    ("operation", "tiling"),
    [
        (op, tiling)
        for op in (*OPERATIONS, *SECANT)
        for tiling in TILINGS
        if op.name == "step" or tiling != ONE
    ],
    ids=str,
)
def test_runs_repeat_bit_for_bit(operation: Operation, tiling: Tiling | None) -> None:
    """And leave nothing behind that a step after them, clipped by the norm of all, would see."""

    def once() -> Problem:
        problem = operation.on(some(tiling, operation.rule), tiling=tiling)
        KERNELS.step(problem, max_norm=0.1)
        return problem

    first = once()
    for _ in range(4 if ON_GPU else 1):
        again = once()
        again.assert_same(first)
        assert_same_bits(again.ledger, first.ledger, "ledger")
        if isinstance(first.returned, Tensor):
            assert_same_bits(again.returned, first.returned, "what is returned")


@pytest.mark.parametrize(
    ("operation", "precision"),
    [(op, p) for op in OPERATIONS for p in (PRECISIONS if op is OPERATIONS[0] else (FP32, BF16))],
    ids=str,
)
@pytest.mark.parametrize("tiling", TILINGS[1:])
def test_alignment_changes_no_bit(
    operation: Operation, precision: Precision, tiling: Tiling | None
) -> None:
    """Full, aligned chunks take wide accesses, the rest takes masked ones in smaller blocks."""
    aligned, shifted = (
        operation.on(some(tiling, operation.rule, shift=n), precision=precision, tiling=tiling)
        for n in (0, 1)
    )
    assert (aligned.tensors.tables()[1] % 2 == 1).all()
    empty = [int(not length) for length in shifted.tensors.lengths]
    assert (shifted.tensors.tables()[1] % 2).tolist() == empty
    shifted.assert_same(aligned, rows=[*aligned.rows, "weight"])


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_launch_counts(operation: Operation) -> None:
    with counted_launches() as log:
        operation.on(plain((30, 1), (7, 9)))
    assert log == list(operation.kernels)
