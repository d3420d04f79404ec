"""Launches of the kernel tests: both backends, checked after every call, counted, far away."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_memory import assert_same_bits
from kernel_problems import Problem
from kernel_specs import plain
from torch import Tensor
from triton_hybrid.kernels.backend import TORCH, TRITON, Backend
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger import PART_COLUMN
from triton_hybrid.kernels.multi_tensor import ChunkTable, TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import ROW
from triton_hybrid.kernels.secant import products_size
from triton_hybrid.kernels.trial import new_trial

from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.orthogonal import TURNED
from triton_hybrid.predictors.slow_ema import SlowEMA

KERNELS_OF = "triton_hybrid.kernels."
"""Modules that have some."""
SLOW_EMA, LINEAR = SlowEMA.displacement, Linear.displacement
ORTHOGONAL = TURNED
LEFT = ("residue", "moves")
"""What a prediction along the slow EMA leaves behind when it is undone."""


class Checked:
    """A backend whose every call is given poisoned scratch and sums, and is checked."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __repr__(self) -> str:
        return self.backend.name

    def step(self, *problems: Problem, **options: Any) -> None:
        """One base step over problems that share their scalars."""
        options = {"max_norm": None, "slow_beta": 0.9, "observed": True, **options}
        sets = [problem.tensors for problem in problems]
        self.backend.step(sets, problems[0].scalars, **options)
        self._check(*problems)

    def predict(
        self,
        problem: Problem,
        along: Displacement = SLOW_EMA,
        coefficients: Tensor | None = None,
        **options: Any,
    ) -> None:
        """One predicted step."""
        if not along.again and coefficients is None:
            coefficients = problem.ratios()
        options = {"threshold": 0.5, "share": 1.0, "first": True, **options}
        problem.poison(3)
        before = problem.ledger.clone()
        sets = problem.tensors, problem.scalars
        problem.again = along if along.again else None
        self.backend.predict(*sets, along, coefficients, **options)
        assert_same_bits(problem.ledger, before, "the ledger of a move")
        self._check(problem)

    def check_move(self, problem: Problem, **options: Any) -> None:
        """What follows a predicted step."""
        options = {"threshold": 0.5, "limit": 1e9, "cooldown": 10.0, "last": True, **options}
        again = problem.again
        self.backend.check_move(problem.tensors, problem.scalars, again=again, **options)
        self._check(problem)

    def slopes(self, problem: Problem) -> Tensor:
        """Measures the gradient along the displacement; returns the sums."""
        problem.poison(3)
        before = problem.snapshot()
        self.backend.slopes(problem.tensors, problem.scalars, problem.again)
        self._check(problem)
        problem.assert_unchanged(before)
        return problem.sums

    def correct(self, problem: Problem, *, restart: bool = False) -> None:
        """Places the weights."""
        prediction, ledger = problem.prediction.clone(), problem.ledger.clone()
        again = problem.again
        self.backend.correct(problem.tensors, problem.scalars, restart=restart, again=again)
        self._check(problem)
        assert_same_bits(problem.prediction, prediction, "step fractions of a correction")
        assert_same_bits(problem.ledger, ledger, "the ledger of a correction")

    def gram(self, problem: Problem) -> Tensor:
        """Ends a cycle; returns the sums."""
        problem.products = problem.arena.carve((len(problem.specs), 2), torch.float64)
        problem.poison(2)
        self.backend.gram(problem.tensors, problem.scalars.ledger, problem.products)
        self._check(problem)
        return problem.products

    def along(self, problem: Problem) -> None:
        """The momentum as the rule sees it."""
        self.backend.along(problem.tensors, problem.scalars)
        self._check(problem)

    def products(self, problem: Problem, history: int, trial: Tensor | None = None) -> Tensor:
        """The inner products of the pairs."""
        out = problem.arena.put(torch.zeros(products_size(history), dtype=torch.float64))
        trial = pairs_of(problem) if trial is None else trial
        self.backend.products(problem.tensors, problem.scalars, trial, out, history)
        self._check(problem)
        return out

    def base_slope(self, problem: Problem) -> Tensor:
        """The slope along the last base step."""
        problem.poison(1)
        before, scalars = problem.snapshot(), problem.scalars
        found: Tensor = self.backend.base_slope(problem.tensors, scalars, scalars.hyperparameters)
        self._check(problem)
        problem.assert_unchanged(before)
        return found

    def move(
        self, problem: Problem, solution: Tensor, history: int, trial: Tensor | None = None
    ) -> None:
        """A quasi-Newton move."""
        problem.poison(3)
        solution = solution.to(problem.ledger.device)
        trial = pairs_of(problem) if trial is None else trial
        self.backend.move(problem.tensors, problem.scalars, trial, solution, history)
        self._check(problem)

    def shift(self, problem: Problem, solution: Tensor) -> None:
        """Adds a displacement to the weights, and to sums that `move` has left."""
        problem.poison(1)
        problem.sums.fill_(1.0)
        solution = solution.to(problem.ledger.device)
        self.backend.shift(problem.tensors, problem.scalars, solution)
        self._check(problem)
        assert (problem.sums[:, :2] == 1.0).all(), "slopes and squares are those of the move"

    def settle(self, problem: Problem, orders: Tensor, history: int) -> None:
        """Notes a pair, places the weights."""
        orders = orders.to(problem.ledger.device)
        self.backend.settle(problem.tensors, problem.scalars, orders, history)
        self._check(problem)

    def _check(self, *problems: Problem) -> None:
        assert problems[0].scalars.arrivals.tolist() == [0, 0], "left as it was found"
        for problem in problems:
            problem.check()


KERNELS, PLAIN = Checked(TRITON), Checked(TORCH)
HISTORY = 3


def pairs_of(problem: Problem, slot: int = 1, pairs: int = HISTORY) -> Tensor:
    """A trial with so many pairs, the next in a slot."""
    return problem.arena.put(new_trial(torch.device("cpu"), {"slot": slot, "pairs": pairs}))


def solution(seed: int = 0, history: int = HISTORY) -> Tensor:
    """A quasi-Newton move: whether to make it, γ, share of the decay, and coefficients."""
    drawn = torch.randn(2 * history, generator=torch.Generator().manual_seed(seed)).double()
    return torch.cat([torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64), drawn])


def assert_leaves_alone(run: Callable[[Problem, Tensor], None]) -> Problem:
    """Who takes no part stays, and what never had a gradient; all do where none is to move."""
    problem = Problem(plain((70,), (9,))).confident()
    problem.prediction[1, PART_COLUMN.value] = 0.0
    problem.rows["exp_avg_sq"][0][:5] = 0.0
    before = problem.snapshot()
    run(problem, solution(1))
    assert_same_bits(problem.rows["weight"][1], before["weight"][1], "weight[1]")
    assert_same_bits(problem.rows["weight"][0][:5], before["weight"][0][:5], "weight[0][:5]")
    assert (problem.rows["weight"][0][5:] != before["weight"][0][5:]).all()
    idle, again = solution(1), problem.snapshot()
    idle[0] = 0.0
    run(problem, idle)
    problem.assert_unchanged(again)
    return problem


RUN: dict[str, Callable[[Checked, Problem], Any]] = {
    "step": lambda on, it: on.step(it),
    "clipped step": lambda on, it: on.step(it, max_norm=0.1),
    "predict": lambda on, it: on.predict(it.confident()),
    "predict linear": lambda on, it: on.predict(it.confident(), LINEAR),
    "predict orthogonal": lambda on, it: on.predict(it.confident(), ORTHOGONAL),
    "along": lambda on, it: on.along(it),
    "roll back": lambda on, it: (on.predict(it.confident()), on.check_move(it, limit=-1.0)),
    "slopes": lambda on, it: on.slopes(it),
    "correct": lambda on, it: on.correct(it.decided(0.75), restart=True),
    "gram": lambda on, it: on.gram(it),
    "base slope": lambda on, it: on.base_slope(it),
    "products": lambda on, it: on.products(it.confident(), HISTORY),
    "move": lambda on, it: on.move(it.confident(), solution(), HISTORY),
    "shift": lambda on, it: on.shift(it.confident(), solution()),
    "settle": lambda on, it: on.settle(it.confident(), torch.tensor([1.0, 1, 0.5, 2]), HISTORY),
}
"""Every launch, with a problem."""
ALONG = pytest.mark.parametrize(
    "along", [SLOW_EMA, LINEAR, ORTHOGONAL], ids=["slow EMA", "linear", "orthogonal"]
)
BACKENDS = pytest.mark.parametrize("backend", [KERNELS, PLAIN], ids=repr)


@contextlib.contextmanager
def far_away(tensors: TensorSet, distance: int = (1 << 31) + 4096) -> Iterator[None]:
    """Lets the elements of a set begin beyond the 32-bit range.

    In its tables addresses are moved down and offsets up by the same distance: their sum is the
    real memory if, and only if, it is formed in 64 bits.
    """
    addresses, extents = (table.clone() for table in tensors.tables())
    for name in tensors.flat:
        addresses[:, ROW[name]] -= distance * tensors.dtype[name].itemsize
    extents += 2 * distance
    near, moved = tensors.chunks, {}

    def chunks(every: bool = False) -> ChunkTable:
        if every not in moved:
            moved[every] = table = copy.copy(near(every))
            table.places = table.places + table.places.new_tensor([0, distance])
        return moved[every]

    vars(tensors).update(tables=lambda: (addresses, extents), chunks=chunks, stamp=object())
    yield
    del vars(tensors)["tables"], vars(tensors)["chunks"]
    tensors.stamp = object()


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of all kernels launched inside the block, in order."""
    log: list[str] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            log.append(self.kernel.__name__)
            return self.kernel[grid]

        def run(self, *arguments: Any, **keywords: Any) -> None:
            log.append(self.kernel.__name__)
            self.kernel.run(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        modules = [its for name, its in sys.modules.items() if name.startswith(KERNELS_OF)]
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Counted(getattr(module, name)))
        yield log


@triton.jit
def _find_chunks(places, extents, found, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
    found += 5 * chunk
    tl.store(found, tensor)
    tl.store(found + 1, start)
    tl.store(found + 2, length)
    tl.store(found + 3, full)
    tl.store(found + 4, chunk_length(start, length, CHUNK, False))


def chunks_in_kernel(places: Tensor, extents: Tensor, block: int, chunk: int) -> list[list[int]]:
    """What a kernel knows of each chunk: tensor, start, its length, whether full, the chunk's."""
    found = torch.full((len(places), 5), -1, dtype=torch.int64, device=places.device)
    if len(places):
        _find_chunks[(len(places),)](places, extents, found, BLOCK=block, CHUNK=chunk)
    return list(found.tolist())
