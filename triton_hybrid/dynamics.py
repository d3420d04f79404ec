"""The dynamics model: a basis, coefficients, and how far to trust them.

Every predictor is a linear combination of a few stored vectors with one set of
coefficients for each tensor:

* ``slow_ema``: the slow gradient EMA, preconditioned by the current second moment (in a Muon
  group: orthogonalised; `auto` leaves Muon's matrices still, because over a tuned Muon no such
  move has gained anything, see ``examples/benchmarks/EXPERIMENTS.md``); one
  predicted step is a quarter of a base step with it, and more as the learning rate decays.
  AdEMAMix (arXiv 2409.03137) mixes the same vector into every step.
* ``linear``: the last cycle's displacement, times the ratio that best explained past cycles
  by the ones before them.
* ``subspace``: reduced-rank extrapolation (Mešina 1977; Eddy 1979). With R_i the last
  cycles' displacements, c minimises |Σ c_i R_i| subject to Σ c_i = 1; the limit is then
  Σ c_i b_i, b_i being the cycles' end points, of which only the differences R_i are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, reduce
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.gram import gram, gram_reference
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.predict import predict, predict_reference
from triton_hybrid.memory import ParameterSet
from triton_hybrid.runtime import Runtime

REGULARISATION = 1e-6
"""Added to the Gram matrix's diagonal, relative to its mean."""
REGRESSION_DECAY = 0.5
"""Weight of past cycles in `linear`'s least squares."""
LOW_NOISE = 0.9
"""Signal share of the squared gradient above which `auto` takes the trajectory. Full-batch runs
at a good learning rate oscillate, and stay far below it; there the slow EMA is better too."""
LINEAR_HISTORY = 2
LEVEL_STEPS = 2
"""Full steps between two stretches of the slow EMA."""


def history_needed(config: HybridConfig) -> int:
    """How many cycle displacements the configured predictor keeps."""
    if config.predictor == "linear":
        return LINEAR_HISTORY
    return config.history if config.predictor in ("subspace", "auto") else 0


class DynamicsModel:
    """Learns the motion of the weights, and moves them along it.

    Args:
        runtime: Bound state.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._config = runtime.config
        self._history = history_needed(runtime.config)
        chosen = runtime.config.predictor
        self.predictor = "slow_ema" if chosen == "auto" else chosen
        self.slot = -1
        self.cycles = -1
        self._slopes_known = False

    @property
    def follows_trajectory(self) -> bool:
        """Whether the basis is made of cycle displacements."""
        return self.predictor in ("subspace", "linear")

    @property
    def ready(self) -> bool:
        """Whether enough was observed to predict."""
        if self.predictor == "none":
            return False
        if not self.follows_trajectory and all(b.still for b in self._runtime.memory.sets):
            return False
        needed = {"slow_ema": -1, "linear": LINEAR_HISTORY, "subspace": self._history}
        return self.cycles >= needed[self.predictor]

    @property
    def refit_steps(self) -> int:
        """Full steps needed after a stretch that held.

        The slow EMA is refitted by every gradient, and the weight EMA needs a second one to
        be an average; a trajectory needs a whole cycle.
        """
        return self._config.full_steps if self.follows_trajectory else LEVEL_STEPS

    def observe_cycle(self) -> None:
        """Ends a cycle of gradient steps: notes its displacement and refits the model."""
        if not self.follows_trajectory:
            return
        if self.cycles < 0:
            self.restart()
            return
        self.slot = (self.slot + 1) % self._history
        self.cycles = min(self.cycles + 1, self._history)
        runtime = self._runtime
        explained = torch.zeros((), dtype=torch.float64, device=runtime.memory.device)
        total = torch.zeros_like(explained)
        products = []
        for bound in runtime.memory.sets:
            rows = self._measure(bound, self.slot)
            assert bound.gram is not None
            bound.gram[:, self.slot, :] = rows
            bound.gram[:, :, self.slot] = rows
            products.append(self._by_age(bound.gram))
        for bound, product in zip(runtime.memory.sets, products):
            known, moved = self._fit(bound, product)
            explained = explained + known
            total = total + moved
        confidence = (explained / total.clamp(min=1e-300)).clamp(0.0, 1.0).sqrt()
        runtime.ledger[INDEX["confidence"]].copy_(confidence)

    def restart(self) -> None:
        """Forgets the trajectory; the next cycle starts at the present weights."""
        self.cycles = 0
        for bound in self._runtime.memory.sets:
            self._measure(bound, 0)

    def _measure(self, bound: ParameterSet, slot: int) -> Tensor:
        runtime = self._runtime
        sums = torch.zeros(
            len(bound.params), self._history, dtype=torch.float64, device=runtime.memory.device
        )
        if runtime.triton:
            gram(bound.tensors, self._history, slot, bound.room_for(self._history), sums)
        else:
            gram_reference(bound.tensors, self._history, slot, sums)
        return sums

    def _by_age(self, product: Tensor) -> Tensor:
        """The Gram matrix of the valid displacements, newest first."""
        # A list as an index would be copied to the device, and the host would wait.
        order = [(self.slot - age) % self._history for age in range(self.cycles)]
        rows = torch.stack([product[:, slot] for slot in order], dim=1)
        return torch.stack([rows[:, :, slot] for slot in order], dim=2)

    def _fit(self, bound: ParameterSet, product: Tensor) -> tuple[Tensor, Tensor]:
        """Sets the coefficients; returns explained and total squared motion of the cycle."""
        assert bound.coefficients is not None
        assert bound.regression is not None
        total = product[:, 0, 0].sum()
        if self.predictor == "linear":
            known, newest = _fit_linear(product, bound.regression)
        else:
            known, newest = _fit_subspace(product)
        bound.coefficients.zero_()
        for age, column in enumerate(newest.unbind(1)):
            bound.coefficients[:, (self.slot - age) % self._history] = column
        return known, total

    def predict(self, planned: int, first: bool, level: bool = False) -> None:
        """Moves the weights by one predicted step.

        Args:
            planned: Predicted steps in this row.
            first: Whether this is the first of them, which keeps the snapshot.
            level: Whether the average of the weights has been kept up to date.
        """
        runtime = self._runtime
        memory = runtime.memory
        share = {
            "slow_ema": 1.0,
            "linear": 1.0 / self._config.full_steps,
            "subspace": 1.0 / planned,
        }[self.predictor]
        # A trajectory makes the same step again, along the same slopes, bit for bit.
        known = self.follows_trajectory and not first and self._slopes_known
        measured = not known and (runtime.triton or runtime.wants_slopes)
        self._slopes_known = True
        if not known and not measured:
            memory.sums[:, 0].zero_()
        for bound, part in zip(memory.sets, memory.parts):
            if bound.still and not self.follows_trajectory:
                memory.sums[part].zero_()
                if first:
                    bound.keep_snapshot()
                continue
            basis = bound.coefficients if self.follows_trajectory else None
            shared = (bound.tensors, bound.group, bound.steps, runtime.hyper, basis, bound.memory)
            options: dict[str, Any] = {
                "threshold": float(self._config.confidence_threshold),
                "share": share,
                "save": first and not self.follows_trajectory,
                "level": level,
                "with_slopes": measured,
                "matrices": bound.matrices,
            }
            sums = memory.sums[part]
            if runtime.triton:
                predict(*shared, runtime.ledger, bound.room_for(3), sums, **options)
            else:
                predict_reference(*shared, runtime.ledger, sums, **options)

    def choose(self, signal: float) -> None:
        """Lets ``auto`` pick the model by the measured signal share of the gradient."""
        if self._config.predictor != "auto":
            return
        wanted = "subspace" if signal > LOW_NOISE else "slow_ema"
        if wanted != self.predictor:
            self.predictor = wanted
            self.cycles = -1

    def state(self) -> dict[str, int]:
        """Everything that must survive a checkpoint, as integers."""
        return {
            "slot": self.slot,
            "cycles": self.cycles,
            "subspace": int(self.predictor == "subspace"),
        }

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self.slot = int(state["slot"])
        self.cycles = int(state["cycles"])
        if self._config.predictor == "auto":
            self.predictor = "subspace" if state["subspace"] else "slow_ema"


def _fit_linear(product: Tensor, regression: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio of each displacement to the one before it, by least squares over past cycles."""
    newest = torch.zeros(len(product), 1, dtype=torch.float64, device=product.device)
    known = torch.zeros((), dtype=torch.float64, device=product.device)
    if product.shape[1] < 2:
        regression.zero_()
        return known, newest
    cross, past = product[:, 0, 1], product[:, 1, 1]
    fitted = regression[:, 1] > 0
    ratio = torch.where(fitted, regression[:, 0] / regression[:, 1].clamp(min=1e-300), 1.0)
    residual = product[:, 0, 0] - 2.0 * ratio * cross + ratio * ratio * past
    known = (product[:, 0, 0] - residual).sum().clamp(min=0.0)
    regression.mul_(REGRESSION_DECAY)
    regression[:, 0] += cross
    regression[:, 1] += past
    newest[:, 0] = regression[:, 0] / regression[:, 1].clamp(min=1e-300)
    return known, newest


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves regularised symmetric systems, batched, without waiting for the device."""
    size = matrix.shape[-1]
    diagonal = reduce(matrix.diagonal(dim1=-2, dim2=-1), "tensor i -> tensor 1 1", reduction="mean")
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + eye * (REGULARISATION * diagonal + 1e-300)
    solution: Tensor = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)
    return torch.where(solution.isfinite(), solution, torch.zeros_like(solution))


def _fit_subspace(product: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced-rank extrapolation from the Gram matrix, newest displacement first.

    Returns:
        Squared motion of the newest cycle that the older ones had predicted, and the
        coefficients of the displacements in the extrapolated move.
    """
    count = product.shape[1]
    ones = torch.ones(len(product), count, dtype=torch.float64, device=product.device)
    weights = _solve(product, ones)
    weights = weights / weights.sum(-1, keepdim=True)
    weights = torch.where(weights.isfinite(), weights, torch.zeros_like(weights))
    # b_newest - b_i is the sum of the displacements after i, so the move Σ c_i (b_i - b_newest)
    # takes each displacement minus the weights of all older end points.
    older = weights.flip(-1).cumsum(-1).flip(-1) - weights
    known = torch.zeros((), dtype=torch.float64, device=product.device)
    if count >= 3:
        # The recurrence that led from the older displacements to the second newest one,
        # applied once more, predicts the newest.
        recurrence = _solve(product[:, 2:, 2:], product[:, 2:, 1])
        guess = product[:, 1 : count - 1, 1 : count - 1]
        cross = product[:, 1 : count - 1, 0]
        square = einsum(recurrence, guess, recurrence, "tensor i, tensor i j, tensor j -> tensor")
        known = (2.0 * (recurrence * cross).sum(-1) - square).sum().clamp(min=0.0)
    return known, -older
