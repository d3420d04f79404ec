"""What an optimizer is made with, beside its parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from triton_hybrid.accumulation import AccumulationConfig
from triton_hybrid.checks import (
    Configuration,
    check_choice,
    check_flag,
    check_number,
    is_int,
    require,
    warn,
)
from triton_hybrid.kernels.ledger import FIRST_SCALE

OFFLOADS = ("none", "cpu", "pinned")
BACKENDS = ("auto", "triton", "torch")
MASTER_WEIGHTS = ("auto", "split", "none")


def predictor_names() -> tuple[str, ...]:
    """Values of `HybridConfig.predictor`."""
    # The registry is built of classes that take a HybridConfig.
    from triton_hybrid.predictors import PREDICTORS

    return tuple(PREDICTORS)


@dataclass(frozen=True, kw_only=True)
class HybridConfig(Configuration):
    """When `HybridOptimizer` predicts, how far, and what it accepts.

    Attributes:
        warmup_steps: Gradient steps before anything else; they collect the baseline of loss,
            gradient norm and update size. At least 0.
        full_steps: Gradient steps of a Full phase: before the first prediction, and, for the
            trajectory of ``linear``, in every cycle. A first rejection costs a quarter of it, and
            each further one in a row doubles that. The slow EMA is refitted by every gradient;
            while its predictions hold, one Full step separates two stretches. At least 1.
        max_predict_steps: Predicted steps between two Full phases; ``secant`` goes on while its
            moves hold. At least 1.
        correction_interval: Predicted steps in a row before a Correct step; 1 with ``secant``,
            whatever this says. At least 1.
        divergence_threshold: Standard deviations above their running mean that gradient norm and
            loss may have at the predicted point. Positive.
        confidence_threshold: Least confidence at which the weights are moved, in [0, 1].
        predictor: The dynamics model: ``"slow_ema"`` (of AdamW's and Lion's matrices and
            filters, their orthogonalised momentum; on a CPU those with a side of at most 256),
            ``"secant"`` (for training without noise: quasi-Newton moves, AdamW groups only),
            ``"linear"``, ``"none"`` (the base rule alone), or ``"auto"``: ``secant`` where
            training is found deterministic, for which the losses must be known, else
            ``slow_ema``. With ``auto`` and ``slow_ema`` the slow EMA is a part of Muon's momentum.
        history: Pairs of moves and gradient changes that ``secant`` keeps, each 8 bytes a
            parameter. In [1, 32].
        slow_beta: Largest decay of the slow gradient EMA, in (0, 1). Its window is a quarter of the
            run so far until this is reached.
        inline: True: the Predict steps run inside the `step()` that ends a gradient part, so every
            call consumes one gradient. False: one phase step a call.
        offload: Where state lives that AdamW does not have (slow EMA, directions, snapshot,
            displacements, pairs): ``"none"`` (the device), ``"cpu"``, or ``"pinned"``, page-locked
            host memory, from which copies do not hold the host up. It visits the device for the
            steps that touch it; what a gradient step touches comes back while the backward pass
            before it runs. In a stretch of more than four predictions without a gradient that do
            not read the moments (stepped drive, ``linear``), these leave too. The results are the
            same bits. Parameters on the CPU have one memory only, and nothing is copied. Not for
            steps captured in a CUDA graph.

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
        for name in ("warmup_steps", "full_steps", "max_predict_steps", "correction_interval"):
            value, least = getattr(self, name), int(name != "warmup_steps")
            require(is_int(value, least), name, value, f"an integer >= {least}")
        require(is_int(self.history, 1, 32), "history", self.history, "an integer in [1, 32]")
        for name, allowed, ok in (
            ("divergence_threshold", "a positive finite number", lambda x: x > 0),
            ("confidence_threshold", "in [0, 1]", lambda x: 0 <= x <= 1),
            ("slow_beta", "in (0, 1)", lambda x: 0 < x < 1),
        ):
            check_number(name, getattr(self, name), allowed, ok)
        check_choice("predictor", self.predictor, predictor_names())
        check_choice("offload", self.offload, OFFLOADS)
        check_flag("inline", self.inline)

    @classmethod
    def quick_validation(cls) -> HybridConfig:
        """The configuration of the source's run: 50 steps of 4 x 64 tokens on GPT-2 small.

        Its six numbers, with the predictor for noisy gradients: with so few tokens a step
        ``auto`` would choose nothing else.
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


@dataclass(frozen=True)
class Settings:
    """Options of `HybridOptimizer`, which documents them, checked; they survive pickling."""

    config: HybridConfig
    max_grad_norm: float | None = None
    master_weights: str = "auto"
    loss_scale: float | str | None = None
    capturable: bool = False
    backend: str = "auto"
    accumulation: AccumulationConfig | None = None

    def __post_init__(self) -> None:
        config, limit, scale = self.config, self.max_grad_norm, self.loss_scale
        require(isinstance(config, HybridConfig), "hybrid", config, "a HybridConfig or None")
        check_flag("capturable", self.capturable)
        windows = self.accumulation
        known = windows is None or isinstance(windows, AccumulationConfig)
        require(known, "accumulation", windows, "an AccumulationConfig or None")
        check_choice("backend", self.backend, BACKENDS)
        check_choice("master_weights", self.master_weights, MASTER_WEIGHTS)
        if limit is not None:
            allowed = "a positive finite number, or None"
            check_number("max_grad_norm", limit, allowed, lambda x: x > 0)
            object.__setattr__(self, "max_grad_norm", float(limit))
        if scale is not None and scale != "dynamic":
            allowed = "None, 'dynamic', or a positive number that FP32 can hold"
            check_number("loss_scale", scale, allowed)
            single = float(torch.tensor(float(scale), dtype=torch.float32, device="cpu"))
            require(0 < single < math.inf, "loss_scale", scale, allowed)
            object.__setattr__(self, "loss_scale", single)

    def backend_for(self, device: torch.device) -> str:
        """``"triton"`` or ``"torch"``: what runs the steps of parameters on a device."""
        if self.backend != "auto":
            return self.backend
        return "triton" if device.type == "cuda" else "torch"

    def scale_entries(self, ledger: Mapping[str, float]) -> dict[str, float]:
        """Ledger entries of the loss scale: a dynamic one goes on where a checkpoint has it."""
        tracker = ledger.get("growth_tracker", -1.0)
        if self.loss_scale != "dynamic":
            return {"loss_scale": float(self.loss_scale or 1.0), "growth_tracker": -1.0}
        if tracker >= 0:
            return {"loss_scale": ledger["loss_scale"], "growth_tracker": tracker}
        return {"loss_scale": FIRST_SCALE, "growth_tracker": 0.0}

    def warn_about_idle_gpu(self, device: torch.device) -> None:
        """Warns where the parameters are on the CPU beside a GPU, and nobody said that it is so."""
        if self.backend == "auto" and device.type == "cpu" and torch.cuda.is_available():
            warn(
                "the parameters are on the CPU although a GPU is there; "
                "HybridOptimizer runs with backend='torch' on the CPU"
            )

    def refuse_grad_scaler(self) -> None:
        """Refuses a GradScaler beside ``loss_scale`` with a RuntimeError."""
        if self.loss_scale is not None:
            raise RuntimeError(
                "loss_scale is set, and a GradScaler is used: both would scale; use "
                "scale_loss(loss) and step() without the GradScaler, or make the optimizer with "
                "loss_scale=None"
            )
