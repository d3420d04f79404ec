"""``orthogonal``: a step along the orthogonalised slow EMA, for matrices.

    displacement = -factor · 3 lr · 0.2 √max(m, n) · Newton-Schulz(slow_ema / (√v̂ + ε))

For an m x n matrix: what Muon would do with the slow EMA, seen in the metric of the base rule, and
with the length that Muon's steps have beside AdamW's. One orthogonalisation a prediction, where
Muon has one a gradient; the base rule, its state and its learning rate stay what they are. What is
no matrix stays where it is, and so does what is much longer than wide: an embedding of many words
would be half of the arithmetic, and gains as much from its base steps.

Elements whose gradient was never other than zero do not move.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.flat_shards import handle_of
from triton_hybrid.kernels.direction import weights_of
from triton_hybrid.kernels.displacement import Displacement, ScaledRow, scaled_row
from triton_hybrid.kernels.matrices import Coefficients, MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz import QUINTIC
from triton_hybrid.kernels.rows import address_row
from triton_hybrid.kernels.scalars import HYPER, LR, Scalars
from triton_hybrid.predictors.predictor import SLOW_EMA as SLOW_EMA_ROW
from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.rules.muon import ADAMW_RMS, scratch_dtype
from triton_hybrid.rules.rule import Rule
from triton_hybrid.rules.whole_matrices import WholeMatrices
from triton_hybrid.shards import is_part
from triton_hybrid.state import PREDICTION, SNAPSHOT, Batch, Home, Member, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

SLOW_BETA = 0.95
"""Largest decay of the slow EMA. The measurements are in ``examples/benchmarks/EXPERIMENTS.md``."""
LENGTH = 3.0
"""Base steps that one predicted step stands for, at every learning rate."""
STEPS: Coefficients = QUINTIC * 3
"""Of Newton and Schulz: five took 0.005 off a loss of 1.53, on two seeds."""
LARGEST_ASPECT = 6
"""A matrix this many times longer than wide is left to the base rule: GPT-2's embedding has 65,
Llama's 8 to 31; gate and up of a feed-forward layer in one have 5.4."""
REFIT_STEPS = 2
"""Full steps between two stretches; every gradient refits the slow EMA."""

DIRECTION = StateRow("direction", home=Home.HOST, when=lambda plan: plan.edge or not plan.gradient)
"""What is moved along; made anew by the first prediction in a row."""
_DIRECTION = address_row("direction")
_LENGTH = tl.constexpr(LENGTH)


def is_hidden(shape: Sequence[int]) -> bool:
    """Whether a parameter of a shape is taken for a matrix between layers."""
    return len(shape) == 2 and min(shape) > 1 and max(shape) < LARGEST_ASPECT * min(shape)


@triton.jit
def _factors(row, factor):
    return -factor * (tl.load(row + LR) * _LENGTH)


@triton.jit
def _block(
    addresses, tensor, begin, length, factor, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    return scaled_row(
        addresses, _DIRECTION, tensor, begin, length, factor, coefficients, STATE, BLOCK, FULL
    )


class _Torch(ScaledRow):
    """The displacement in plain torch."""

    def factors(
        self, tensors: TensorSet, scalars: Scalars, factor: Tensor, scales: Tensor | None
    ) -> list[Tensor]:
        assert scales is not None
        rates = scalars.hyperparameters[tensors.group.long(), HYPER["lr"]]
        return [-factor * (rates * LENGTH), scales.double()]


class Orthogonal(Predictor):
    """Follows the orthogonalised slow EMA."""

    name = "orthogonal"
    judges_with = (DIRECTION.name,)
    displacement = Displacement(
        _factors, _block, _Torch("direction"), ("direction", "slow_ema"), along_rule=False
    )

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.refit_steps, self.slow_beta = REFIT_STEPS, min(config.slow_beta, SLOW_BETA)
        self._matrices: dict[Batch, MatrixSet | WholeMatrices] = {}
        self._scales: dict[Batch, Tensor] = {}

    def kind_of(self, rule: Rule, member: Member) -> Hashable:
        """Whether it moves a parameter."""
        whole = member.whole
        cut = member.param.ndim != 2 or handle_of(whole) is not None
        return rule.kernels.along is not None and is_hidden(whole.shape) and not cut

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return self.rows_of_kind(rule, rule.kernels.along is not None)

    def rows_of_kind(self, rule: Rule, kind: Hashable) -> tuple[StateRow, ...]:
        return (SLOW_EMA_ROW, *((SNAPSHOT, DIRECTION) if kind else ()), PREDICTION)

    def leaves(self, batch: Batch) -> bool:
        return batch.aliased or not batch.tensors.has(DIRECTION.name)

    def bind(self, engine: Engine) -> None:
        super().bind(engine)
        for batch in engine.batches:
            if batch in self.left:
                continue
            tensors, count, members = batch.tensors, len(batch.params), batch.members
            grids, schedules = [(1, 1)] * count, [STEPS] * count
            dtype = scratch_dtype(members[0].param, {"ns_dtype": None})
            if is_part(members[0].whole):
                self._matrices[batch] = WholeMatrices(tensors, members, grids, schedules, dtype)
            else:
                matrices = MatrixSet(tensors, grids, schedules, dtype=dtype)
                matrices.scratch()  # memory is allocated at the first step
                self._matrices[batch] = matrices
            scales = [ADAMW_RMS * math.sqrt(max(member.whole.shape)) for member in members]
            self._scales[batch] = torch.tensor(scales, dtype=torch.float32, device=engine.device)

    @property
    def ready(self) -> bool:
        # Of ranks that hold other tensors, all must be in the same phase.
        return bool(self._matrices) or self.engine.spread

    def explain(self, state: Mapping[str, float]) -> tuple[bool | None, str]:
        obstacle = f"no matrix is less than {LARGEST_ASPECT} times longer than wide"
        return None, "" if state.get("moves", 1) else obstacle

    def state(self) -> dict[str, Any]:
        return {"moves": int(bool(self._matrices))}

    def coefficients(self, batch: Batch) -> Tensor:
        return self._scales[batch]

    def move(self, first: bool) -> None:
        backend, scalars = self.engine.backend, self.engine.scalars
        for batch, matrices in self._matrices.items() if first else ():
            torch._foreach_copy_([*batch.tensors.flat[SNAPSHOT.name]], weights_of(batch.tensors))
            if isinstance(matrices, WholeMatrices):
                backend.along(batch.tensors, scalars)
                matrices.orthogonalise_row(scalars, DIRECTION.name)
            else:
                backend.direct(batch.tensors, matrices, scalars)
        super().move(first)
