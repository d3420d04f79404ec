"""One launch of every kernel, as its launcher asks for it, on tensors that are never touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.adamw import HYPER_FIELDS, Workspace, adamw_step
from triton_hybrid.kernels.audit_targets import TYPE_NAMES, Launch, Target, recorded
from triton_hybrid.kernels.chunks import MAX_HISTORY, NONE, OWN, SPLIT, TensorSet, gpu_tiling
from triton_hybrid.kernels.correct import SLOPE_SUMS, correct, slopes
from triton_hybrid.kernels.divergence import MEMORY_COLUMNS, judge
from triton_hybrid.kernels.gram import gram, reduce_partials
from triton_hybrid.kernels.ledger import new_ledger
from triton_hybrid.kernels.matrices import MatrixSet, matrix_tiling
from triton_hybrid.kernels.newton_schulz import QUINTIC, orthogonalise
from triton_hybrid.kernels.predict import MOVE_COLUMNS, predict
from triton_hybrid.kernels.settle import settle


@dataclass(frozen=True)
class Precision:
    """Dtypes of a model.

    Attributes:
        param: What the model computes with; gradients have it too.
        weight: What the optimizer computes with, the dtype of all state.
        kept: How weights are kept, see ``rows.py``.
    """

    param: torch.dtype
    weight: torch.dtype
    kept: int = OWN

    @property
    def name(self) -> str:
        """Short name, as in the table."""
        return TYPE_NAMES[self.param] + {OWN: "", SPLIT: " split", NONE: " alone"}[self.kept]

    @property
    def weights(self) -> tuple[int, ...]:
        """Item sizes of what a weight is read from."""
        wide, narrow = self.weight.itemsize, self.param.itemsize
        remainder = torch.int16.itemsize
        return {OWN: (wide,), SPLIT: (narrow, remainder), NONE: (narrow,)}[self.kept]

    @property
    def stored(self) -> tuple[int, ...]:
        """Item sizes of what a weight and its parameter are written to."""
        return self.weights + (self.master if self.kept == OWN else ())

    @property
    def master(self) -> tuple[int, ...]:
        """Item size of the parameter where a master stands behind it."""
        return (self.param.itemsize,) if self.param != self.weight else ()


FP32 = Precision(torch.float32, torch.float32)
FP64 = Precision(torch.float64, torch.float64)
HALVES = (Precision(torch.float16, torch.float32), Precision(torch.bfloat16, torch.float32))
WITHOUT_MASTERS = (
    Precision(torch.bfloat16, torch.float32, SPLIT),
    Precision(torch.bfloat16, torch.float32, NONE),
    Precision(torch.float16, torch.float32, NONE),
)

# Three tensors of several chunks: no argument is 1 or a multiple of 16 by accident, and so
# none is specialised. One tensor of one chunk is the opposite: everything is.
MANY = (30_000, 20_000, 10_000)
SINGLE = (8_192,)
MATRICES = ((384, 512), (512, 256), (33, 65))
"""A wide, a tall and an odd-sized one."""


class _Problem:
    """The tensors of a launch: small, on the CPU, never touched by a kernel."""

    def __init__(self, target: Target, precision: Precision, lengths: Sequence[int]) -> None:
        state = precision.weight
        rows: dict[str, list[Tensor]] = {"param": self._row(lengths, precision.param)}
        rows["grad"] = self._row(lengths, precision.param)
        if precision.kept == SPLIT:
            rows["remainder"] = self._row(lengths, torch.int16)
        elif precision.kept == OWN and precision.master:
            rows["weight"] = self._row(lengths, state)
        history = [f"history_{index}" for index in range(MAX_HISTORY)]
        for name in ("exp_avg", "exp_avg_sq", "slow_ema", "weight_ema", "snapshot", *history):
            rows[name] = self._row(lengths, state)
        self.tiling = gpu_tiling(target.processors, target.warp_size, state.itemsize)
        self.tensors = TensorSet(rows, self.tiling, precision.kept)
        count = len(lengths)
        self.group = torch.zeros(count, dtype=torch.int32)
        self.steps = torch.zeros(count)
        self.hyper = torch.zeros(1, len(HYPER_FIELDS), dtype=torch.float64)
        self.memory = torch.zeros(count, MEMORY_COLUMNS.value)
        self.ledger = new_ledger(torch.device("cpu"))
        self.coefficients = torch.zeros(count, MAX_HISTORY)
        self.arrivals = torch.zeros(2, dtype=torch.int32)

    @staticmethod
    def _row(lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(length, dtype=dtype) for length in lengths]

    def scratch(self, columns: int) -> tuple[Tensor, Tensor]:
        """Chunk partials and tensor sums of so many columns."""
        chunks = self.tensors.chunks(every=True)
        sums = torch.zeros(len(self.tensors), columns, dtype=torch.float64)
        return torch.zeros(chunks.count, columns), sums


def _step_launches(
    problem: _Problem, target: Target, clip: bool, slow: bool, measured: bool, **options: Any
) -> list[Launch]:
    with recorded(target) as launches:
        adamw_step(
            [problem.tensors],
            [problem.group],
            [problem.steps],
            problem.hyper,
            problem.ledger,
            Workspace([problem.tensors]),
            max_norm=1.0 if clip else None,
            slow_beta=0.9 if slow else 0.0,
            observed=True,
            measured=measured,
            **options,
        )
    return launches


def _move_launches(
    problem: _Problem,
    target: Target,
    coefficients: Tensor | None,
    again: bool = False,
    **options: Any,
) -> list[Launch]:
    partials, sums = problem.scratch(MOVE_COLUMNS)
    with recorded(target) as launches:
        predict(
            problem.tensors,
            problem.group,
            problem.steps,
            problem.hyper,
            coefficients,
            problem.memory,
            problem.ledger,
            partials,
            sums,
            threshold=0.5,
            share=0.5,
            save=not again,
            with_slopes=not again,
            **options,
        )
    return launches


def adamw_launch(
    target: Target,
    precision: Precision,
    lengths: Sequence[int],
    part: str,
    clip: bool,
    slow: bool,
    measured: bool,
) -> Launch:
    """`adamw_step`; ``part`` is one launch, statistics or update."""
    problem = _Problem(target, precision, lengths)
    alone = part == "one launch"
    launches = _step_launches(problem, target, clip, slow, measured, cooperative=alone)
    return launches[-1 if part == "update" else 0]


def predict_launch(
    target: Target,
    precision: Precision,
    lengths: Sequence[int],
    trajectory: bool,
    again: bool = False,
) -> Launch:
    """The pass of `predict` over all elements, from the trajectory or from the slow EMA.

    Args:
        target: The device.
        precision: The dtypes.
        lengths: Of the tensors.
        trajectory: Whether from the trajectory.
        again: Whether it is a later step in a row, without slopes and snapshot.
    """
    problem = _Problem(target, precision, lengths)
    basis = problem.coefficients if trajectory else None
    return _move_launches(problem, target, basis, again)[0]


def settle_launch(target: Target, precision: Precision, lengths: Sequence[int]) -> Launch:
    """`settle`, by the last tensor set of a device."""
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        settle(
            problem.tensors,
            problem.scratch(MOVE_COLUMNS)[1],
            problem.memory,
            problem.ledger,
            problem.arrivals,
            threshold=0.5,
            limit=10.0,
            cooldown=5.0,
            last=True,
        )
    return launches[0]


def gram_launch(target: Target, precision: Precision, lengths: Sequence[int], slot: int) -> Launch:
    """The pass of `gram` over all elements; ``slot`` takes the newest displacement."""
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        gram(problem.tensors, MAX_HISTORY, slot, *problem.scratch(MAX_HISTORY))
    return launches[0]


def reduce_launch(target: Target) -> Launch:
    """`reduce_partials`, over the sums of a move."""
    problem = _Problem(target, FP32, MANY)
    partials, sums = problem.scratch(MOVE_COLUMNS)
    with recorded(target) as launches:
        reduce_partials(partials, problem.tensors.chunks(every=True), sums)
    return launches[0]


def slopes_launch(target: Target, precision: Precision, lengths: Sequence[int]) -> Launch:
    """The pass of `slopes` over all elements."""
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        table = (problem.group, problem.hyper, problem.ledger)
        slopes(problem.tensors, *table, *problem.scratch(SLOPE_SUMS))
    return launches[0]


def correct_launch(
    target: Target, precision: Precision, lengths: Sequence[int], restart: bool
) -> Launch:
    """`correct`, with or without the start of a new cycle."""
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        correct(problem.tensors, problem.memory, problem.ledger, restart=restart)
    return launches[0]


def judge_launch(target: Target, lengths: Sequence[int]) -> Launch:
    """`judge`."""
    problem = _Problem(target, FP32, lengths)
    with recorded(target) as launches:
        judge(problem.ledger, problem.scratch(SLOPE_SUMS)[1], problem.memory, 2.5, 5.0)
    return launches[0]


class _Matrices(_Problem):
    """Matrices of a Muon set: a wide, a tall and an odd-sized one.

    Args:
        target: What is compiled for.
        precision: Dtypes of the model.
        products: Dtype of the products' inputs.
    """

    def __init__(self, target: Target, precision: Precision, products: torch.dtype) -> None:
        super().__init__(target, precision, [rows * columns for rows, columns in MATRICES])
        names = ("param", "grad", "weight", "exp_avg", "slow_ema", "snapshot")
        rows = {
            name: [flat.view(shape) for flat, shape in zip(self.tensors.flat[name], MATRICES)]
            for name in names
            if precision.master or name != "weight"
        }
        for name in ("update", "direction"):
            rows[name] = [torch.zeros(shape, dtype=products) for shape in MATRICES]
        self.tensors = TensorSet(rows, self.tiling)
        count = len(MATRICES)
        tiling = matrix_tiling(products, torch.device("cuda"))
        whole = [(1, 1)] * count
        steps = [QUINTIC * 3] * count
        self.matrices = MatrixSet(self.tensors, whole, steps, [1.0] * count, tiling)


def muon_launch(
    target: Target, precision: Precision, products: torch.dtype, number: int, source: str | None
) -> Launch:
    """One of the launches of `orthogonalise`; ``source`` None takes the momentum."""
    problem = _Matrices(target, precision, products)
    with recorded(target) as launches:
        orthogonalise(
            problem.matrices,
            problem.group,
            problem.hyper,
            "update",
            source=source,
            partials=Workspace([problem.tensors]).partials if source is None else None,
            ledger=problem.ledger if source is None else None,
            max_norm=1.0,
        )
    return launches[number]


def muon_update_launch(target: Target, precision: Precision, slow: bool, measured: bool) -> Launch:
    """The update of `adamw_step` for a Muon set."""
    problem = _Matrices(target, precision, torch.bfloat16)
    matrices = [problem.matrices]
    return _step_launches(problem, target, True, slow, measured, matrices=matrices)[-1]


def muon_predict_launch(target: Target, precision: Precision) -> Launch:
    """The pass of `predict` over all elements of a Muon set."""
    problem = _Matrices(target, precision, torch.bfloat16)
    return _move_launches(problem, target, None, matrices=problem.matrices)[-2]
