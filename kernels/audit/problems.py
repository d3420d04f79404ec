"""What launchers are called with: tensors of every precision, which no kernel ever touches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton_hybrid.kernels.audit.targets import TYPE_NAMES, Target
from triton_hybrid.kernels.launch import gpu_tiling
from triton_hybrid.kernels.matrices import MatrixSet, matrix_tiling
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz import QUINTIC
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT
from triton_hybrid.kernels.scalars import Scalars

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.rules import OPTIONS
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import StateRow


@dataclass(frozen=True)
class Precision:
    """Dtypes of a model."""

    param: torch.dtype  # what the model computes with; gradients have it too
    weight: torch.dtype  # what the optimizer computes with, the dtype of state
    kept: int = OWN  # how weights are kept, see ``rows.py``

    @property
    def name(self) -> str:
        """Short name, as in the table."""
        return TYPE_NAMES[self.param] + {OWN: "", SPLIT: " split", NONE: " alone"}[self.kept]

    @property
    def weights(self) -> tuple[int, ...]:
        """Item sizes of what a weight is read from, and written to."""
        wide, narrow = self.weight.itemsize, self.param.itemsize
        own = (wide, narrow) if self.param != self.weight else (wide,)
        return {OWN: own, SPLIT: (narrow, torch.int16.itemsize), NONE: (narrow,)}[self.kept]


FP32 = Precision(torch.float32, torch.float32)
FP64 = Precision(torch.float64, torch.float64)
HALVES = (Precision(torch.float16, torch.float32), Precision(torch.bfloat16, torch.float32))
WITHOUT_MASTERS = (
    Precision(torch.bfloat16, torch.float32, SPLIT),
    Precision(torch.bfloat16, torch.float32, NONE),
    Precision(torch.float16, torch.float32, NONE),
)

Shapes = Sequence[tuple[int, ...]]
# Three tensors of several chunks: no argument is 1 or a multiple of 16 by accident, and so
# none is specialised. One tensor of one chunk is the opposite: everything is.
MANY: Shapes = ((30_000,), (20_000,), (10_000,))
SINGLE: Shapes = ((8_192,),)
MATRICES: Shapes = ((384, 512), (512, 256), (33, 65))
"""A wide, a tall and an odd-sized one."""


def rows_of(rule: Rule) -> dict[str, StateRow]:
    """Every row that a launch for a rule may read, by name."""
    predictors = [make(HybridConfig()) for make in PREDICTORS.values()]
    rows = [*rule.rows, *(row for each in predictors for row in each.rows_for(rule))]
    return {row.name: row for row in rows if row.shape is None}


def itemsize(rule: Rule, name: str, precision: Precision) -> int:
    """Bytes of an element of a row."""
    return rows_of(rule)[name].itemsize(precision.param, {**OPTIONS, "ns_dtype": "bfloat16"})


class Problem:
    """The tensors of a launch, small and on the CPU.

    ``shapes`` None are those of the rule's kind; ``products`` is the dtype of the matrix products,
    and ``without`` names rows that there are none of.
    """

    def __init__(
        self,
        target: Target,
        precision: Precision,
        rule: Rule,
        shapes: Shapes | None = None,
        products: str = "bfloat16",
        without: Sequence[str] = (),
    ) -> None:
        shapes = shapes or (MATRICES if rule.bind else MANY)
        state = precision.weight

        def row(dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype) for shape in shapes]

        rows = {"param": row(precision.param), "grad": row(precision.param)}
        if precision.kept == SPLIT:
            rows["remainder"] = row(torch.int16)
        elif precision.kept == OWN and precision.param != state:
            rows["weight"] = row(state)
        group = {**OPTIONS, "ns_dtype": products}
        for name, declared in rows_of(rule).items():
            if name not in without:
                rows[name] = row(declared.dtype(rows["param"][0], group))
        tiling = gpu_tiling(target.processors, state.itemsize)
        self.tensors = TensorSet(rows, tiling, precision.kept, rule=rule.kernels)
        if rule.bind is not None:
            count = len(shapes)
            cut = matrix_tiling(self.tensors.dtype["update"], torch.device("cuda"))
            grids = [(1, 1)] * count
            self.tensors.matrices = MatrixSet(self.tensors, grids, [QUINTIC * 3] * count, cut)
        self.scalars = Scalars([self.tensors])
