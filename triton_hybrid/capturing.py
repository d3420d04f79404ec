"""What a step refuses while a CUDA graph is being captured (see ``graphs.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.groups import first_device
from triton_hybrid.kernels.capture import refuse_capture

_USE = "triton_hybrid.graphs.GraphedSteps captures when everything is ready"
SCALED = (
    "a GradScaler drives the step, and its flag lies elsewhere for every gradient: make the "
    "optimizer with loss_scale='dynamic' and use scale_loss(loss) instead"
)


def refuse_unready(
    groups: Sequence[Mapping[str, Any]], device: torch.device | None, capturable: bool
) -> None:
    """Refuses a captured step that would wait for the device, or allocate.

    Args:
        groups: Parameter groups.
        device: Of what is bound; None before the first step, and where it must be bound anew.
        capturable: As in HybridOptimizer.
    """
    if not capturable:
        refuse_capture(
            device or first_device(groups),
            "capturable=False: must be True, or steps wait for the device to learn what comes next",
        )
    if device is None:
        refuse_capture(
            first_device(groups),
            "the optimizer has not stepped yet, or its parameters, their memory, state or settings "
            f"have changed since: let a step run before one is captured ({_USE})",
        )


def refuse_scaler(device: torch.device) -> None:
    """Refuses the numbers of a GradScaler in a captured step."""
    refuse_capture(device, SCALED)


def refuse_number(device: torch.device, loss: Tensor | float) -> None:
    """Refuses a loss that lies on the host."""
    if not isinstance(loss, Tensor) or loss.device != device:
        refuse_capture(
            device,
            f"loss={loss!r} is a number on the host, and every replay would tell the same: "
            f"must be a tensor on {device}, or be observed outside of the graph",
        )
