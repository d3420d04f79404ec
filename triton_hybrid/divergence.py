"""The divergence monitor: judges a predicted move, and takes back what failed."""

from __future__ import annotations

import math
from typing import Any

from triton_hybrid.kernels.correct import slopes, slopes_reference
from triton_hybrid.kernels.divergence import judge, judge_reference
from triton_hybrid.kernels.settle import settle, settle_reference
from triton_hybrid.runtime import Runtime

# A displacement this many times the usual base update, for each predicted step of base-step
# size, is out of proportion. An extrapolation to the end of a slow mode may be far longer.
STEP_LIMIT = 10.0
EXTRAPOLATION_LIMIT = 1000.0


class DivergenceMonitor:
    """Watches, on the device, what predictions lead to.

    Non-finite values, the size of the jump against the usual update, gradient norm and
    loss at the predicted point against their running statistics.

    Args:
        runtime: Bound state.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @property
    def _first_cooldown(self) -> float:
        """Gradient steps after a first rejection; each further one in a row doubles them.

        A single rejection is mostly an odd batch, so it costs a quarter of a Full phase.
        """
        return float(math.ceil(self._runtime.config.full_steps / 4))

    def settle(self, steps_in_row: int, extrapolates: bool) -> None:
        """After a predicted step: books it, or takes the whole stretch back.

        Args:
            steps_in_row: Predicted steps since the snapshot, this one included.
            extrapolates: Whether the model jumps to a limit instead of stepping.
        """
        runtime = self._runtime
        memory, config = runtime.memory, runtime.config
        limit = EXTRAPOLATION_LIMIT if extrapolates else STEP_LIMIT * steps_in_row
        for index, bound in enumerate(memory.sets):
            options: dict[str, Any] = {
                "threshold": config.confidence_threshold,
                "limit": config.divergence_threshold * limit,
                "cooldown": self._first_cooldown,
                "last": index == len(memory.sets) - 1,
            }
            shared = (bound.tensors, memory.sums, memory.per_tensor, runtime.ledger)
            if runtime.triton:
                settle(*shared, memory.workspace.arrivals, **options)
            else:
                settle_reference(*shared, **options)

    def judge(self) -> None:
        """At a Correct step: the verdict, from the gradient at the predicted point."""
        runtime = self._runtime
        memory, config = runtime.memory, runtime.config
        for bound, part in zip(memory.sets, memory.parts):
            if runtime.triton:
                slopes(
                    bound.tensors,
                    bound.group,
                    runtime.hyper,
                    runtime.ledger,
                    bound.room_for(3),
                    memory.sums[part],
                )
            else:
                slopes_reference(
                    bound.tensors,
                    bound.group,
                    runtime.hyper,
                    runtime.ledger,
                    memory.sums[part],
                    runtime.wants_slopes,
                )
        decide = judge if runtime.triton else judge_reference
        decide(
            runtime.ledger,
            memory.sums,
            memory.per_tensor,
            float(config.divergence_threshold),
            self._first_cooldown,
        )
