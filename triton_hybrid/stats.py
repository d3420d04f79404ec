"""What the optimizer reports about itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_hybrid.checkpoint import Progress
from triton_hybrid.kernels.ledger import INDEX, START
from triton_hybrid.kernels.ledger_torch import is_flat_torch
from triton_hybrid.phases import PHASES, Phase


@dataclass(frozen=True)
class HybridStats:
    """A snapshot of counters and measurements.

    Attributes:
        steps: Phase steps so far, predicted ones included.
        gradient_evaluations: Steps that consumed a gradient, skipped and rejected included.
        predicted_steps: Steps that moved the weights without a gradient.
        predicted_fraction: ``predicted_steps / steps``. A share of steps, not a speed-up.
        steps_per_phase: Steps by phase name.
        seconds_per_phase: Host seconds spent inside `step()` by phase name. On a GPU the
            device works on after `step()` has returned.
        acceptance_rate: Accepted predictions / verified ones; NaN before the first.
        rollbacks: Predictions rolled back.
        horizon: Present factor on predicted displacements; halved by every rejection.
        confidence: Share of the newest motion, in norm, that the model had predicted.
        loss_flat: Whether the observed losses neither fall nor rise by more than their noise, for
            which nothing is predicted then.
        signal: Share of the squared gradient that is known to be signal; the rest is noise, and
            what parameters without a slow EMA have of it.
        predictor: The model in use, where ``auto`` has chosen.
        deterministic: Whether ``auto`` found training deterministic; None where nobody looked, or
            there was too little to see.
        reason: Why ``auto`` has chosen so; else empty.
        divergences: Rejections by cause: ``nonfinite``, ``jump``, ``norm``, ``loss``.
        skipped_nonfinite: Gradients skipped because they were not finite.
        loss_scale: Present loss scale; 1 without scaling.
        state_bytes_device: Bytes of optimizer state on the parameters' device.
        state_bytes_host: Bytes of optimizer state in host memory, away from the device.
        windows: Steps whose gradient was accumulated, with ``accumulation`` set.
        micro_batches: Backward passes in them.
        micro_batches_saved: How many fewer these are than windows of ``maximum`` would have had.
        noise_scale: tr Σ / |G|² of the gradient, in micro-batches; None where it was not measured.
    """

    steps: int
    gradient_evaluations: int
    predicted_steps: int
    predicted_fraction: float
    steps_per_phase: dict[str, int]
    seconds_per_phase: dict[str, float]
    acceptance_rate: float
    rollbacks: int
    horizon: float
    confidence: float
    loss_flat: bool
    signal: float
    predictor: str
    deterministic: bool | None
    reason: str
    divergences: dict[str, int]
    skipped_nonfinite: int
    loss_scale: float
    state_bytes_device: int
    state_bytes_host: int
    windows: int = 0
    micro_batches: int = 0
    micro_batches_saved: int = 0
    noise_scale: float | None = None

    @classmethod
    def of(
        cls,
        progress: Progress,
        ledger: Mapping[str, float],
        chosen: tuple[str, bool | None, str],
        size: tuple[int, int],
    ) -> HybridStats:
        """Those of a run; its ledger is empty before the first step."""
        entry = {**dict.fromkeys(INDEX, 0.0), **START, **ledger}
        steps, seconds = progress.steps, progress.seconds
        verified = entry["accepted"] + entry["rejected"]
        predicted, total = steps[Phase.PREDICT], sum(steps.values())
        causes = ("nonfinite", "jump", "norm", "loss")
        return cls(
            steps=total,
            gradient_evaluations=total - predicted,
            predicted_steps=predicted,
            predicted_fraction=predicted / total if total else 0.0,
            steps_per_phase={phase.value: steps[phase] for phase in PHASES},
            seconds_per_phase={phase.value: seconds[phase] for phase in PHASES},
            acceptance_rate=entry["accepted"] / verified if verified else math.nan,
            rollbacks=int(entry["rejected"]),
            divergences={cause: int(entry[f"cause_{cause}"]) for cause in causes},
            skipped_nonfinite=int(entry["skipped"]),
            horizon=entry["horizon"],
            confidence=entry["confidence"],
            loss_flat=bool(is_flat_torch(entry)),
            signal=entry["signal"],
            loss_scale=entry["loss_scale"],
            predictor=chosen[0],
            deterministic=chosen[1],
            reason=chosen[2],
            state_bytes_device=size[0],
            state_bytes_host=size[1],
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        phases = "  ".join(
            f"{name} {count} ({self.seconds_per_phase[name]:.2f} s)"
            for name, count in self.steps_per_phase.items()
        )
        causes = ", ".join(f"{name} {count}" for name, count in self.divergences.items() if count)
        windows = ""
        if self.windows:
            mean = self.micro_batches / self.windows
            known = "" if self.noise_scale is None else f"; noise scale {self.noise_scale:.2f}"
            windows = (
                f"\n{self.windows} windows of {mean:.2f} micro-batches, "
                f"{self.micro_batches_saved} saved{known}"
            )
        judged = self.acceptance_rate == self.acceptance_rate
        accepted = f"accepted {100 * self.acceptance_rate:.0f}%" if judged else "none judged yet"
        return (
            f"{self.steps} steps: {self.gradient_evaluations} gradient evaluations, "
            f"{self.predicted_steps} predicted ({100 * self.predicted_fraction:.1f}% of steps)\n"
            f"phases: {phases}\n"
            f"predictor {self.predictor}{f' ({self.reason})' if self.reason else ''}\n"
            f"confidence {self.confidence:.2f}{', the loss is flat' if self.loss_flat else ''}, "
            f"signal {self.signal:.3f}, horizon {self.horizon:g}\n"
            f"{accepted}, {self.rollbacks} rollbacks"
            f"{f' ({causes})' if causes else ''}, "
            f"{self.skipped_nonfinite} non-finite gradients skipped\n"
            f"state: {self.state_bytes_device / 2**20:.1f} MiB on the device, "
            f"{self.state_bytes_host / 2**20:.1f} MiB on the host{windows}"
        )
