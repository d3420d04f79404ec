"""What an optimizer is made with, beside its parameter groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from triton_hybrid.config import HybridConfig
from triton_hybrid.rules.rule import check_number

BACKENDS = ("auto", "triton", "torch")
MASTER_WEIGHTS = ("auto", "split", "none")


@dataclass(frozen=True)
class Settings:
    """Options of `HybridOptimizer`, checked; they survive pickling.

    Attributes:
        config: The phase machine's configuration.
        max_grad_norm: Global-norm clipping threshold, or None.
        master_weights: How FP32 masters are kept.
        loss_scale: None, a number that FP32 can hold, or ``"dynamic"``.
        capturable: Whether a step never waits for the device.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: A value out of range; the message names argument, value and range.
    """

    config: HybridConfig
    max_grad_norm: float | None = None
    master_weights: str = "auto"
    loss_scale: float | str | None = None
    capturable: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.config, HybridConfig):
            raise ValueError(f"hybrid={self.config!r}: must be a HybridConfig or None")
        if not isinstance(self.capturable, bool):
            raise ValueError(f"capturable={self.capturable!r}: must be True or False")
        _one_of("backend", self.backend, BACKENDS)
        _one_of("master_weights", self.master_weights, MASTER_WEIGHTS)
        object.__setattr__(self, "max_grad_norm", _threshold(self.max_grad_norm))
        object.__setattr__(self, "loss_scale", _loss_scale(self.loss_scale))

    def refuse_grad_scaler(self) -> None:
        """Refuses a GradScaler beside ``loss_scale``.

        Raises:
            RuntimeError: Both would scale.
        """
        if self.loss_scale is not None:
            raise RuntimeError(
                "loss_scale is set, and a GradScaler is used: both would scale; use "
                "scale_loss(loss) and step() without the GradScaler, or make the optimizer with "
                "loss_scale=None"
            )


def refuse_unbuilt(**options: Any) -> None:
    """Refuses options that are part of the design but not built yet.

    Raises:
        NotImplementedError: One that is not None.
    """
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not built yet: must be None")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {allowed}")


def _threshold(value: Any) -> float | None:
    if value is None:
        return None
    allowed = "a positive finite number, or None"
    check_number("max_grad_norm", value, allowed, 0.0)
    if value == 0:
        raise ValueError(f"max_grad_norm={value!r}: must be {allowed}")
    return float(value)


def _loss_scale(value: Any) -> float | str | None:
    if value is None or value == "dynamic":
        return None if value is None else "dynamic"
    allowed = "None, 'dynamic', or a positive number that FP32 can hold"
    check_number("loss_scale", value, allowed, 0.0)
    scale = float(torch.tensor(float(value), dtype=torch.float32))
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"loss_scale={value!r}: must be {allowed}")
    return scale
