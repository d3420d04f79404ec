"""The base step: AdamW (Loshchilov and Hutter, arXiv 1711.05101), and Muon where it is asked."""

from __future__ import annotations

from triton_hybrid.kernels.adamw import adamw_step, adamw_step_reference
from triton_hybrid.runtime import Runtime


class BaseRule:
    """One base step for all parameters, with everything that rides in the same pass.

    Args:
        runtime: Bound state.
        max_grad_norm: Global-norm clipping threshold, or None.
    """

    def __init__(self, runtime: Runtime, max_grad_norm: float | None) -> None:
        self._runtime = runtime
        self._max_grad_norm = max_grad_norm

    def step(self, measured: bool, level: bool) -> None:
        """Updates moments, weights and slow EMA, unless the gradient is not finite.

        Args:
            measured: Whether update and slow direction are compared, for the confidence.
            level: Whether the average of the weights is kept up to date.
        """
        runtime = self._runtime
        sets = runtime.memory.sets
        tensors = [bound.tensors for bound in sets]
        groups = [bound.group for bound in sets]
        steps = [bound.steps for bound in sets]
        matrices = [bound.matrices for bound in sets]
        if runtime.triton:
            adamw_step(
                tensors,
                groups,
                steps,
                runtime.hyper,
                runtime.ledger,
                runtime.memory.workspace,
                max_norm=self._max_grad_norm,
                slow_beta=runtime.slow_beta,
                observed=runtime.slow_beta > 0,
                measured=measured,
                level=level,
                matrices=matrices,
            )
        else:
            adamw_step_reference(
                tensors,
                groups,
                steps,
                runtime.hyper,
                runtime.ledger,
                max_norm=self._max_grad_norm,
                slow_beta=runtime.slow_beta,
                observed=runtime.slow_beta > 0,
                measured=measured,
                level=level,
                matrices=matrices,
            )
