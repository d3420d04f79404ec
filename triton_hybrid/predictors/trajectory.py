"""A basis of the last cycles' displacements, which `linear` and `subspace` share.

displacement = Σ_j c[t, j] · history_j
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.gram import HISTORY, MAX_HISTORY
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.predict import Displacement
from triton_hybrid.kernels.rows import load_row
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import Batch, Home, StateRow, fixed

DISPLACEMENTS = tuple(
    StateRow(
        f"history_{j}",
        home=Home.HOST,
        when=lambda plan: plan.trajectory and (plan.edge or not plan.gradient),
    )
    for j in range(MAX_HISTORY)
)
"""Displacements of the last cycles, a ring."""


@triton.jit
def _factors(ledger, row, rate, factor, PULLED: tl.constexpr):
    return factor, factor


@triton.jit
def _block(
    addresses, tensor, begin, length, w, factor, pull, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, PULLED: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    displacement = tl.zeros([BLOCK], STATE)
    for j in tl.static_range(N):
        basis = load_row(addresses, HISTORY + j, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        displacement += tl.load(coefficients + tensor * N + j).to(STATE) * basis
    return factor * displacement


class _Torch:
    """The displacement in plain torch."""

    def factors(
        self,
        tensors: TensorSet,
        scalars: Scalars,
        factor: Tensor,
        coefficients: Tensor | None,
        pull: bool,
    ) -> list[Tensor]:
        assert coefficients is not None
        return [factor, *coefficients.double().unbind(1)]

    def block(
        self,
        tensors: TensorSet,
        rows: Mapping[str, Tensor],
        w: Tensor,
        factors: Sequence[Any],
        out: Tensor,
    ) -> Tensor:
        moved = out[0].zero_()
        for j, coefficient in enumerate(factors[1:]):
            moved += coefficient * rows[f"history_{j}"]
        return moved.mul_(factors[0])


class Trajectory(Predictor):
    """Keeps the displacements of the last cycles, and their inner products.

    Args:
        config: The phase machine's configuration.
        history: How many displacements it keeps.
    """

    follows_trajectory = True
    displacement = Displacement(_factors, _block, _Torch(), (), along_rule=False)

    def __init__(self, config: HybridConfig, history: int) -> None:
        super().__init__(config)
        self.history = history
        self._slot = -1
        self.cycles = -1
        """Cycles whose displacements are stored; -1 before the first begins."""

    @property
    def lends_moments(self) -> bool:
        return True

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        size = self.history
        return (
            *super().rows_for(rule),
            *DISPLACEMENTS[:size],
            StateRow("gram", fixed(torch.float64), shape=(size, size)),
            StateRow("regression", fixed(torch.float64), shape=(2,)),
            StateRow("coefficients", fixed(torch.float32), shape=(size,)),
        )

    @property
    def ready(self) -> bool:
        return self.cycles >= self.history

    @property
    def refit_steps(self) -> int:
        return self.config.full_steps

    def coefficients(self, batch: Batch) -> Tensor:
        return batch.tables["coefficients"]

    def move_held(self) -> None:
        self.cycles = 0

    def end_cycle(self) -> None:
        if self.cycles < 0:
            self.restart()
            return
        self._slot = (self._slot + 1) % self.history
        self.cycles = min(self.cycles + 1, self.history)
        engine = self.engine
        explained = torch.zeros((), dtype=torch.float64, device=engine.device)
        total = torch.zeros_like(explained)
        products = []
        for batch in engine.batches:
            rows = self._measure(batch, self._slot)
            gram = batch.tables["gram"]
            gram[:, self._slot, :] = rows
            gram[:, :, self._slot] = rows
            products.append(self._by_age(gram))
        for batch, product in zip(engine.batches, products):
            known, newest = self.fit(product, batch.tables["regression"])
            coefficients = batch.tables["coefficients"]
            coefficients.zero_()
            for age, column in enumerate(newest.unbind(1)):
                coefficients[:, (self._slot - age) % self.history] = column
            explained = explained + known
            total = total + product[:, 0, 0].sum()
        confidence = (explained / total.clamp(min=1e-300)).clamp(0.0, 1.0).sqrt()
        engine.scalars.ledger[INDEX["confidence"]].copy_(confidence)

    @abc.abstractmethod
    def fit(self, product: Tensor, regression: Tensor) -> tuple[Tensor, Tensor]:
        """Fits the model to the Gram matrix of the displacements, newest first.

        Args:
            product: FP64 ``[tensors, cycles, cycles]``.
            regression: FP64 ``[tensors, 2]``, kept from cycle to cycle.

        Returns:
            Squared motion of the newest cycle that the older ones had predicted, and FP64
            ``[tensors, cycles]``, the coefficients of the displacements in the next move.
        """

    def forget(self) -> None:
        """Begins anew with the next cycle."""
        self.cycles = -1

    def restart(self) -> None:
        """Forgets the trajectory; the next cycle starts at the present weights."""
        self.cycles = 0
        for batch in self.engine.batches:
            self._measure(batch, 0)

    def _measure(self, batch: Batch, slot: int) -> Tensor:
        size = (len(batch.params), self.history)
        sums = torch.zeros(size, dtype=torch.float64, device=self.engine.device)
        self.engine.backend.gram(batch.tensors, self.history, slot, sums)
        return sums

    def _by_age(self, product: Tensor) -> Tensor:
        """The Gram matrix of the valid displacements, newest first."""
        # A list as an index would be copied to the device, and the host would wait.
        order = [(self._slot - age) % self.history for age in range(self.cycles)]
        rows = torch.stack([product[:, slot] for slot in order], dim=1)
        return torch.stack([rows[:, :, slot] for slot in order], dim=2)

    def state(self) -> dict[str, int]:
        return {"slot": self._slot, "cycles": self.cycles}

    def restore(self, state: dict[str, int]) -> None:
        self._slot, self.cycles = int(state["slot"]), int(state["cycles"])
