"""Every step in two launches, where the grid barrier does not hold; also a plugin of pytest."""

from __future__ import annotations

from triton_hybrid.kernels import step

step.cooperative_launches = lambda device: False  # type: ignore[assignment]
