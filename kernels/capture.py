"""Is a CUDA graph being captured?

While one is, nothing runs on the device, and what the host knows now is what every replay will do:
whatever allocates, compiles or uploads must refuse, for it would be wrong in silence.
"""

from __future__ import annotations

import torch

CAPTURED_ON: set[str] = {"cuda"}
"""Types of devices with graphs. The tests add the CPU's, with a stand-in for torch's."""
NEVER_RUN = (
    "a step of this kind has not run yet, and compiles its kernels and uploads its tables: let "
    "every kind of step run once before one is captured"
)


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a graph."""
    return device.type in CAPTURED_ON and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, why: str) -> None:
    """Raises a RuntimeError that says why, if a graph is being captured."""
    if capturing(device):
        raise RuntimeError(f"this cannot be captured in a CUDA graph: {why}")
