"""What must outlive pickling and checkpoints, beside parameter groups and state.

Torch keeps ``state`` and ``param_groups`` and drops everything else, so phase, counters and ledger
lie in the groups. What is bound for launches is made anew from all of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from triton_hybrid.config import HybridConfig
from triton_hybrid.flat_shards import joined
from triton_hybrid.groups import bare_name, every_parameter
from triton_hybrid.phases import PHASES, Phase, PhaseController
from triton_hybrid.rules import RULES
from triton_hybrid.shards import mark_fingerprint, placed
from triton_hybrid.state import DECLARED, State

VERSION = 2
"""Of checkpoints; those of release 0.1.0, which name none, are read as well."""
PROGRESS = "hybrid_progress"
"""Key of every parameter group that carries phase, counters and ledger in checkpoints."""
BOUND = "bound"

ROW_NAMES = {old: new for rule in RULES.values() for old, new in rule.checkpoint_names.items()}
"""Names of rows in torch's optimizers, and ours."""
OLD_ENTRIES = {"verdict": "decision", "subspace": "quiet"}
"""What was called otherwise in version 0.1.0, in the ledger and in the predictor's state."""
OLD_ROWS = {"gram", "coefficients", "weight_ema", *(f"history_{slot}" for slot in range(8))}
"""Rows of version 0.1.0, which kept a ring of displacements, all their inner products, and an
average of the weights."""


@dataclass
class Progress:
    """How far training has come: steps and host seconds by phase, what was read last, and so on."""

    controller: PhaseController
    steps: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    ledger: dict[str, float] = field(default_factory=dict)  # of the device, as read last
    predictor: dict[str, Any] | None = None  # its state; None before the first step
    known_skips: int = 0  # skipped gradients that the host knows of
    # Of a checkpoint in which a prediction stands: a number for the places of the parameters that
    # were trained (`places_number`), for whoever loads it may train others; else -1.
    bound: int = -1
    losses: int = 0  # observed since the last gradient step; the ledger has their mean

    @property
    def gradients(self) -> int:
        """Steps that consumed a gradient."""
        return sum(self.steps.values()) - self.steps[Phase.PREDICT]

    def count(self, phase: Phase, started: float) -> None:
        """Counts a step that began at that time of ``time.perf_counter``."""
        self.steps[phase] += 1
        self.seconds[phase] += time.perf_counter() - started

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for the groups."""
        return {
            "version": VERSION,
            "controller": self.controller.state(),
            "steps": {phase.value: self.steps[phase] for phase in PHASES},
            "seconds": {phase.value: self.seconds[phase] for phase in PHASES},
            "ledger": dict(self.ledger),
            "model": dict(self.predictor or {}),
            BOUND: self.bound,
            "losses": self.losses,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], config: HybridConfig) -> Progress:
        """The inverse of `to_dict`; reads what version 0.1.0 wrote, too."""
        controller = PhaseController(config)
        controller.restore(saved["controller"])
        # The checkpoint may be of a stepped run, or of one with predictions.
        if config.inline or config.predictor == "none":
            controller.need_gradient()
        model, ledger = (
            {OLD_ENTRIES.get(name, name): value for name, value in saved.get(part, {}).items()}
            for part in ("model", "ledger")
        )
        return cls(
            controller,
            steps={phase: int(saved["steps"][phase.value]) for phase in PHASES},
            seconds={phase: float(saved["seconds"][phase.value]) for phase in PHASES},
            ledger={name: float(value) for name, value in ledger.items()},
            predictor=model or None,
            known_skips=int(ledger.get("skipped", 0)),
            bound=int(saved.get(BOUND, -1)),
            losses=int(saved.get("losses", 0)),
        )


def check_checkpoint(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuses a checkpoint that does not fit, before anything is changed.

    Raises:
        ValueError: The checkpoint is of AMSGrad, of a later version, or of another model: other
            groups, names or shapes. The message says what differs.
    """
    saved_groups = state_dict["param_groups"]
    if any(group.get("amsgrad") for group in saved_groups):
        raise ValueError("amsgrad=True in the checkpoint: must be False, it is not built")
    progress = (saved_groups[0].get(PROGRESS) or {}) if saved_groups else {}
    version = progress.get("version", 1)
    if version > VERSION:
        raise ValueError(
            f"checkpoint version={version}: must be at most {VERSION}; a later release of "
            "triton_hybrid has written it"
        )
    if len(saved_groups) != len(groups):
        raise ValueError(
            "the checkpoint has a different number of parameter groups: "
            f"{len(saved_groups)}, must be {len(groups)}"
        )
    for index, (saved, group) in enumerate(zip(saved_groups, groups)):
        differs = list(_names_that_differ(saved, group))
        counts = len(saved["params"]), len(group["params"])
        if differs or counts[0] != counts[1]:
            raise ValueError(
                f"the checkpoint is of another model: parameter group {index} has {counts[0]} "
                f"parameters, must be {counts[1]} with the same names in the same order"
                + _listed(differs)
            )
    differs = list(_shapes_that_differ(state_dict, groups))
    if differs:
        raise ValueError("the checkpoint is of another model" + _listed(differs))


def _listed(differs: list[str], most: int = 4) -> str:
    more = f"; and {len(differs) - most} more" if len(differs) > most else ""
    return f": {'; '.join(differs[:most])}{more}" if differs else ""


def _names_that_differ(saved: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[str]:
    """Where both know the names of their parameters; those of wrappers do not count."""
    theirs, ours = (list(map(bare_name, its.get("param_names") or ())) for its in (saved, group))
    if theirs and ours and theirs != ours:
        for place, (found, wanted) in enumerate(itertools.zip_longest(theirs, ours)):
            if found != wanted:
                yield f"parameter {place} is {found}, must be {wanted}"


def _shapes_that_differ(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> Iterator[str]:
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    for place, (index, param) in enumerate(_paired(state_dict, groups)):
        for key, value in state_dict["state"].get(index, {}).items():
            row = DECLARED.get(ROW_NAMES.get(key, key))
            like_param = row is not None and row.shape is None and isinstance(value, Tensor)
            if like_param and not is_lazy(param) and value.shape != param.shape:
                name = f" ({names[place]})" if isinstance(names[place], str) else ""
                yield (
                    f"{key!r} of parameter {index}{name} has shape {tuple(value.shape)}, must be "
                    f"{tuple(param.shape)} as the parameter"
                )
                break


def _paired(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """Each number in a checkpoint with its parameter: both are in the order of the groups."""
    numbers = [index for group in state_dict["param_groups"] for index in group["params"]]
    return zip(numbers, every_parameter(groups))


def without_tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with what `load_rows` leaves to torch: hyperparameters and plain values."""
    plain = {
        index: {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        if isinstance(entry, dict)
        else entry
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": plain}


def load_rows(
    state: State,
    groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
    hosted: Callable[[str], bool],
) -> None:
    """Copies every tensor of a checkpoint in the dtype it was saved with, to where it belongs.

    Torch would cast floating state to its parameter's dtype, and FP32 state of FP16 parameters
    would die; and what lives in host memory would visit the device on its way there.
    """
    slot = _trajectory_slot(state_dict)
    for index, param in _paired(state_dict, groups):
        if index not in state_dict["state"]:
            continue
        entry = state[param]
        for key, value in joined(_converted(state_dict["state"][index], slot)).items():
            if isinstance(value, Tensor):
                key = ROW_NAMES.get(key, key)
                place = torch.device("cpu") if hosted(key) else param.device
                entry[key] = placed(key, value, param, place)
        mark_fingerprint(param, entry)


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
    if "prediction" in entry:
        # Every tensor took part, and nobody noted how the prediction left it.
        known = entry["prediction"]
        found["prediction"] = torch.cat([known, known.new_tensor([1.0, 0.0, 0.0])])
    if slot >= 0 and f"history_{slot}" in entry:
        found["displacement"] = entry[f"history_{slot}"]
        found["ratio"] = entry["coefficients"][slot]
        found["regression"] = torch.cat([entry["regression"], entry["gram"][slot, slot].view(1)])
    return found
