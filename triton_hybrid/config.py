"""Configuration of the phase machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OFFLOADS = ("none", "cpu", "pinned")


def predictor_names() -> tuple[str, ...]:
    """Values of `HybridConfig.predictor`."""
    # The registry is built of classes that take a HybridConfig.
    from triton_hybrid.predictors import PREDICTORS

    return tuple(PREDICTORS)


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """When `HybridOptimizer` predicts, how far, and what it accepts.

    Attributes:
        warmup_steps: Gradient steps before anything else; they collect the baseline of
            loss, gradient norm and update size. At least 0.
        full_steps: Gradient steps of a Full phase: before the first prediction, and, for the
            trajectory of ``linear``, in every cycle. A first rejection
            costs a quarter of it, and each further one in a row doubles that. The slow EMA
            is refitted by every gradient; while its predictions hold, one Full step
            separates two stretches. At least 1.
        max_predict_steps: Predicted steps between two Full phases. At least 1.
        correction_interval: Predicted steps in a row before a Correct step. At least 1.
        divergence_threshold: Standard deviations above their running mean that gradient
            norm and loss may have at the predicted point. Positive.
        confidence_threshold: Least confidence at which the weights are moved, in [0, 1].
        predictor: The dynamics model: ``"slow_ema"``, ``"linear"``, ``"none"`` (the base rule
            alone), or ``"auto"``, which takes ``linear`` where the gradient is mostly signal and
            ``slow_ema`` where it is mostly noise.
        history: Pairs of moves and gradient changes that a quasi-Newton predictor keeps; no
            predictor reads it at present. In [1, 32].
        slow_beta: Largest decay of the slow gradient EMA, in (0, 1). Its window is a
            quarter of the run so far until this is reached.
        inline: True: the Predict steps run inside the `step()` that ends a gradient part,
            so every call consumes one gradient. False: one phase step a call.
        offload: Where state lives that AdamW does not have (slow EMA, weight EMA, snapshot, cycle
            displacements): ``"none"`` (the device), ``"cpu"``, or ``"pinned"``, page-locked host
            memory, from which copies do not hold the host up. It visits the device for the steps
            that touch it; what a gradient step touches comes back while the backward pass before
            it runs. In a stretch of more than four predictions without a gradient that do not
            read the moments (stepped drive, ``linear``), these leave too. The
            results are the same bits. Parameters on the CPU have one memory only, and nothing is
            copied. Not for steps captured in a CUDA graph.

    Raises:
        ValueError: A value outside its range; the message names field, value and range.
    """

    warmup_steps: int = 20
    full_steps: int = 5
    max_predict_steps: int = 4
    correction_interval: int = 1
    divergence_threshold: float = 3.0
    confidence_threshold: float = 0.1
    predictor: str = "auto"
    history: int = 10
    slow_beta: float = 0.99
    inline: bool = True
    offload: str = "none"

    def __post_init__(self) -> None:
        self._check_int("warmup_steps", 0)
        self._check_int("full_steps", 1)
        self._check_int("max_predict_steps", 1)
        self._check_int("correction_interval", 1)
        self._check_int("history", 1, 32)
        self._check_float("divergence_threshold", "a positive finite number", lambda x: x > 0)
        self._check_float("confidence_threshold", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_float("slow_beta", "in (0, 1)", lambda x: 0 < x < 1)
        self._check_choice("predictor", predictor_names())
        self._check_choice("offload", OFFLOADS)
        if not isinstance(self.inline, bool):
            raise ValueError(f"inline={self.inline!r}: must be True or False")

    def _check_int(self, field: str, least: int, most: int | None = None) -> None:
        value = getattr(self, field)
        allowed = f"an integer >= {least}" if most is None else f"an integer in [{least}, {most}]"
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{field}={value!r}: must be {allowed}")
        if value < least or (most is not None and value > most):
            raise ValueError(f"{field}={value!r}: must be {allowed}")

    def _check_float(self, field: str, allowed: str, ok: Any) -> None:
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not ok(value):
            raise ValueError(f"{field}={value!r}: must be {allowed}")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{field}={value!r}: must be one of {choices}")

    @classmethod
    def quick_validation(cls) -> HybridConfig:
        """The configuration of the source's run: 50 steps of 4 x 64 tokens on GPT-2 small.

        Its six numbers, with the predictor for noisy gradients: with so few tokens a step
        ``auto`` would choose nothing else, and keep memory for it.
        """
        return cls(
            warmup_steps=5,
            full_steps=10,
            max_predict_steps=5,
            correction_interval=2,
            divergence_threshold=2.5,
            confidence_threshold=0.3,
            predictor="slow_ema",
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridConfig:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: An unknown field, or a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}={values[name]!r}: unknown field, must be one of {known}")
        return cls(**values)
