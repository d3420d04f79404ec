"""How the checks of section 2 compare: FP64 errors of whole roles, and bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from suite_context import Context
from suite_problems import (
    GPU_LAYOUTS,
    TINY_LAYOUTS,
    Layout,
    Problem,
    Values,
    different_bits,
    draw,
    relative_error,
)
from suite_records import Check, SectionResult
from torch import Tensor
from triton_hybrid.kernels.ledger import read_ledger

STATE_TOLERANCE = 2e-6
"""FP32 arithmetic and one rounding to FP32, over a whole role."""
CHANGE_TOLERANCE = 5e-5
"""Of how far the weights moved: the weights round at 6e-8 of their size, not of the move's."""
SUM_TOLERANCE = 1e-5
LEDGER_TOLERANCE = 1e-4
ELEMENT_TOLERANCE = 1e-5
"""Of any single element, relative to its size or to 0.2, whichever is larger."""
RUNS = 5


@dataclass
class Bench:
    """The checks of one dtype, all on the same fresh random numbers."""

    context: Context
    result: SectionResult
    label: str
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        tiny = self.context.tiny
        self.layouts: Sequence[Layout] = TINY_LAYOUTS if tiny else GPU_LAYOUTS
        self.runs = 2 if tiny else RUNS
        self.values: Values = draw(self.layouts, self.context, self.dtype, self.seed)

    def problem(self) -> Problem:
        """A fresh copy of the numbers."""
        return Problem(self.layouts, self.values, self.context, self.dtype)

    def oracle(self) -> Problem:
        """The same numbers in FP64, for a reference."""
        return Problem(self.layouts, self.values, self.context, torch.float64)

    # ------------------------------------------------------------------ what is noted

    def note(
        self,
        kernel: str,
        name: str,
        passed: bool,
        error: float | None = None,
        tolerance: float | None = None,
        detail: str = "",
    ) -> None:
        """Keeps one check."""
        check = Check(name, kernel, self.label, passed, error, tolerance, detail)
        self.context.note(self.result, check)

    def near(self, kernel: str, name: str, errors: dict[str, tuple[float, float]]) -> None:
        """Keeps a comparison of several roles; the worst one is the error."""
        # A NaN is in no order: it must come first by hand.
        worst = max(
            errors,
            key=lambda k: math.inf if math.isnan(errors[k][0]) else errors[k][0] / errors[k][1],
        )
        error, tolerance = errors[worst]
        passed = all(error <= tolerance for error, tolerance in errors.values())
        shown = ", ".join(f"{key} {error:.1e}" for key, (error, _) in errors.items())
        self.note(kernel, name, passed, error, tolerance, f"worst: {worst}; {shown}")

    def rows(self, actual: Problem, oracle: Problem, *names: str) -> dict[str, tuple[float, float]]:
        """Errors of whole roles, and the worst single element of them."""
        errors = {}
        for name in names:
            mine, theirs = actual.rows[name], oracle.rows[name]
            errors[name] = (relative_error(mine, theirs), STATE_TOLERANCE)
            elements = max(
                float(((a.double() - b) / b.abs().clamp(min=0.2)).abs().amax())
                for a, b in zip(mine, theirs)
            )
            errors[f"an element of {name}"] = (elements, ELEMENT_TOLERANCE)
        return errors

    def moved(self, actual: Problem, oracle: Problem) -> dict[str, tuple[float, float]]:
        """The error of how far the weights have moved."""
        start = [weight.double() for weight in self.values["weight"]]
        mine = [w.double() - s for w, s in zip(actual.rows["weight"], start)]
        theirs = [w - s for w, s in zip(oracle.rows["weight"], start)]
        return {"weight change": (relative_error(mine, theirs), CHANGE_TOLERANCE)}

    def ledgers(self, actual: Problem, oracle: Problem) -> dict[str, tuple[float, float]]:
        """The error of the ledger's worst entry."""
        return {"ledger": (ledger_error(actual.ledger, oracle.ledger), LEDGER_TOLERANCE)}

    def intact(self, kernel: str, problem: Problem) -> None:
        """Keeps what must hold after every kernel."""
        spoiled, wrong = problem.spoiled_guards(), problem.misrounded()
        self.note(kernel, "writes nothing outside its tensors", spoiled == 0, float(spoiled), 0.0)
        if problem.has_master:
            self.note(kernel, "parameter is rounded master", wrong == 0, float(wrong), 0.0)

    def same(self, kernel: str, name: str, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Keeps a comparison of every bit."""
        different = different_bits(left, right)
        self.note(kernel, name, different == 0, float(different), 0.0)

    def repeated(self, kernel: str, run: Callable[[], Problem], first: Sequence[Tensor]) -> None:
        """Runs the same again from the same numbers; ``first`` is what the first run left."""
        different = sum(different_bits(run().everything(), first) for _ in range(self.runs - 1))
        self.note(kernel, f"{self.runs} runs, same bits", different == 0, float(different), 0.0)


def scale(sums: Tensor) -> Tensor:
    """The largest of each column, so that sums that cancel are not held against themselves."""
    return sums.abs().amax(0).clamp(min=1.0)


def ledger_error(actual: Tensor, expected: Tensor) -> float:
    """The worst entry's error, relative to its size or to 0.1; NaN where only one is NaN."""
    left, right = read_ledger(actual), read_ledger(expected)
    worst = 0.0
    for name, value in left.items():
        other = right[name]
        if value == other or (math.isnan(value) and math.isnan(other)):
            continue
        error = abs(value - other) / max(abs(other), 0.1)
        worst = error if error > worst or math.isnan(error) else worst
        if math.isnan(worst):
            break
    return worst
