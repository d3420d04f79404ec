"""``subspace``: reduced-rank extrapolation (Mešina 1977; Eddy 1979).

With R_i the last cycles' displacements, c minimises |Σ c_i R_i| subject to Σ c_i = 1; the limit is
then Σ c_i b_i, b_i being the cycles' end points, of which only the differences R_i are kept.
"""

from __future__ import annotations

import torch
from einops import einsum, reduce
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors.trajectory import Trajectory

REGULARISATION = 1e-6
"""Added to the Gram matrix's diagonal, relative to its mean."""
EXTRAPOLATION_LIMIT = 1000.0
"""As `STEP_LIMIT`; an extrapolation to the end of a slow mode may be far longer."""


class Subspace(Trajectory):
    """Jumps to the limit of the trajectory."""

    name = "subspace"

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, config.history)

    def share(self, planned: int) -> float:
        return 1.0 / planned

    def jump_limit(self, steps_in_row: int) -> float:
        return EXTRAPOLATION_LIMIT

    def fit(self, product: Tensor, regression: Tensor) -> tuple[Tensor, Tensor]:
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
            square = einsum(
                recurrence, guess, recurrence, "tensor i, tensor i j, tensor j -> tensor"
            )
            known = (2.0 * (recurrence * cross).sum(-1) - square).sum().clamp(min=0.0)
        return known, -older


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves regularised symmetric systems, batched, without waiting for the device."""
    size = matrix.shape[-1]
    diagonal = reduce(matrix.diagonal(dim1=-2, dim2=-1), "tensor i -> tensor 1 1", reduction="mean")
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + eye * (REGULARISATION * diagonal + 1e-300)
    solution: Tensor = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)
    return torch.where(solution.isfinite(), solution, torch.zeros_like(solution))
