"""What must outlive pickling and checkpoints, beside parameter groups and state.

Torch keeps ``state`` and ``param_groups`` and drops everything else, so phase, counters and ledger
lie in the groups. What is bound for launches is made anew from all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.phases import PHASES, Phase, PhaseController
from triton_hybrid.rules import RULES
from triton_hybrid.state import State

PROGRESS = "hybrid_progress"
"""Key of every parameter group that carries phase, counters and ledger in checkpoints."""

OLD_ENTRIES = {"verdict": "decision", "subspace": "quiet"}
"""What was called otherwise in version 0.1.0, in the ledger and in the predictor's state."""


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        controller: The phase machine.
        steps: Steps taken, by phase.
        seconds: Host seconds spent in them.
        ledger: Entries of the device's ledger, as they were read last.
        predictor: State of the predictor; None before the first step.
        known_skips: Skipped gradients that the host knows of.
    """

    controller: PhaseController
    steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    ledger: dict[str, float] = field(default_factory=dict)
    predictor: dict[str, int] | None = None
    known_skips: int = 0

    @property
    def gradients(self) -> int:
        """Steps that consumed a gradient."""
        return sum(self.steps.values()) - self.steps[Phase.PREDICT]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for the groups."""
        return {
            "controller": self.controller.state(),
            "steps": {phase.value: self.steps[phase] for phase in PHASES},
            "seconds": {phase.value: self.seconds[phase] for phase in PHASES},
            "ledger": dict(self.ledger),
            "model": dict(self.predictor or {}),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], config: HybridConfig) -> Progress:
        """The inverse of `to_dict`; reads what version 0.1.0 wrote, too.

        Args:
            saved: What `to_dict` returned; empty for a fresh start.
            config: Of this optimizer, whose drive may be another than that of the checkpoint.
        """
        progress = cls(PhaseController(config))
        if not saved:
            return progress
        progress.controller.restore(saved["controller"])
        if config.inline:
            progress.controller.need_gradient()
        progress.steps = {phase: int(saved["steps"][phase.value]) for phase in PHASES}
        progress.seconds = {phase: float(saved["seconds"][phase.value]) for phase in PHASES}
        ledger = {name: float(value) for name, value in saved["ledger"].items()}
        progress.ledger = {OLD_ENTRIES.get(name, name): ledger[name] for name in ledger}
        progress.known_skips = int(progress.ledger.get("skipped", 0))
        model = {OLD_ENTRIES.get(name, name): saved["model"][name] for name in saved["model"]}
        progress.predictor = model or None
        return progress


def check_loadable(state_dict: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that this optimizer cannot go on from.

    Raises:
        ValueError: It is of AMSGrad.
    """
    for group in state_dict["param_groups"]:
        if group.get("amsgrad"):
            raise ValueError("amsgrad=True in the checkpoint: must be False, it is not built")


def without_rows(state_dict: Mapping[str, Any], left_out: Callable[[str], bool]) -> dict[str, Any]:
    """A state dict without the rows of some names."""
    passing = {
        index: {key: value for key, value in entry.items() if not left_out(key)}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": passing}


def restore_rows(
    state: State,
    groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
    hosted: Callable[[str], bool],
) -> None:
    """Gives every tensor of state the dtype it was saved with, as a copy where it belongs.

    Torch casts floating state to its parameter's dtype: FP32 state of FP16 parameters would die.

    Args:
        state: The optimizer's, after torch has loaded the state dict.
        groups: The optimizer's parameter groups.
        state_dict: The checkpoint.
        hosted: Whether rows of a name belong in host memory.
    """
    names = {old: new for rule in RULES.values() for old, new in rule.checkpoint_names.items()}
    slot = _trajectory_slot(state_dict)
    saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in groups for param in group["params"]]
    for index, param in zip(saved_ids, params):
        for old in names:
            state[param].pop(old, None)
        for key in [key for key in state[param] if slot is not None and key in OLD_ROWS]:
            del state[param][key]
        for key, value in _converted(state_dict["state"].get(index, {}), slot).items():
            if isinstance(value, Tensor):
                key = names.get(key, key)
                place = torch.device("cpu") if hosted(key) else param.device
                state[param][key] = value.detach().to(device=place, copy=True)


OLD_ROWS = {"gram", "coefficients", *(f"history_{slot}" for slot in range(8))}
"""Rows of version 0.1.0, which kept a ring of displacements and all their inner products."""


def _trajectory_slot(state_dict: Mapping[str, Any]) -> int | None:
    """The place of the newest displacement in a checkpoint of version 0.1.0; None in others."""
    groups = state_dict["param_groups"]
    model = (groups[0].get(PROGRESS) or {}).get("model", {}) if groups else {}
    return int(model["slot"]) if "subspace" in model else None


def _converted(entry: Mapping[str, Any], slot: int | None) -> dict[str, Any]:
    """A parameter's state with its newest displacement under its present name."""
    if slot is None:
        return dict(entry)
    found = {key: value for key, value in entry.items() if key not in OLD_ROWS}
    if slot >= 0 and f"history_{slot}" in entry:
        found["displacement"] = entry[f"history_{slot}"]
        found["ratio"] = entry["coefficients"][slot]
        found["regression"] = torch.cat([entry["regression"], entry["gram"][slot, slot].view(1)])
    return found
