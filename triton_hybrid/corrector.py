"""The residual corrector: places the weights where the verdict says."""

from __future__ import annotations

from triton_hybrid.kernels.correct import correct, correct_reference
from triton_hybrid.runtime import Runtime


class ResidualCorrector:
    """Moves each tensor by the residual between its step fraction and the prediction.

    Args:
        runtime: Bound state.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def correct(self, restart: bool) -> None:
        """Applies the step fractions of the last verdict; 0 is the rollback.

        Args:
            restart: Whether the placed weights start a new cycle of the trajectory.
        """
        runtime = self._runtime
        move = correct if runtime.triton else correct_reference
        for bound in runtime.memory.sets:
            move(bound.tensors, bound.memory, runtime.ledger, restart=restart)
