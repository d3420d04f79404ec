"""Checkpoints written at the verified weights go on from the prediction that was put aside.

So do copies and pickles. Such a checkpoint belongs beside a model with verified weights, and holds
what the parameters, and state that moved with them, held before `VerifiedWeights.eval`. Whoever
loads it gets that back in every parameter that has the verified weights; in others it is dropped,
as after any write.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.checkpoint import PROGRESS
from triton_hybrid.kernels.ledger import PART_COLUMN
from triton_hybrid.shards import is_managed
from triton_hybrid.standing import fingerprint
from triton_hybrid.state import MASTER, PREDICTION, REMAINDER, State

PREDICTED = "predicted"
"""The parameter's entry; the entries of state are called ``predicted_master`` and so on."""
VERIFIED = "verified_fingerprint"
"""Fingerprint of the parameter that it belongs to."""
MOVED = (MASTER.name, REMAINDER.name)

Pending = tuple[Tensor, dict[str, Any], Tensor, dict[str, Tensor]]
"""A parameter, its state, the fingerprint it must have, and what returns, by entry."""


def with_predictions(
    state_dict: dict[str, Any], params: Iterable[Tensor], held: dict[int, Tensor]
) -> dict[str, Any]:
    """A state dict with what was put aside.

    Args:
        state_dict: Of the optimizer, while the verified weights stand. Not changed.
        params: In the order of the state dict, whose keys may be they themselves.
        held: What tensors held before, by the address of their memory.
    """
    entries = copy(state_dict["state"])
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, param in zip(keys, params):
        if param.data_ptr() in held and param.numel():
            entry = entries[key]
            found = {PREDICTED: held[param.data_ptr()], VERIFIED: fingerprint(param)}
            for name in MOVED:
                place = entry[name].data_ptr() if name in entry else None
                if place in held:
                    found[f"{PREDICTED}_{name}"] = held[place]
            entries[key] = {**entry, **found}
    return {**state_dict, "state": entries}


def without_predictions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of verified weights from which no prediction returns, as if others had written.

    Else who loads it would take back a prediction that does not stand. Its argument is not changed.
    """
    entries = {}
    for number, entry in state_dict["state"].items():
        if PREDICTION.name in entry:
            rest = entry[PREDICTION.name].clone()
            rest[PART_COLUMN.value :] = 0.0
            entry = {**entry, PREDICTION.name: rest}
        entries[number] = entry
    groups = []
    for group in state_dict["param_groups"]:
        progress = group[PROGRESS]
        ledger = {**progress["ledger"], "written": 1.0}
        groups.append({**group, PROGRESS: {**progress, "ledger": ledger}})
    return {**state_dict, "state": entries, "param_groups": groups}


def take_predictions(state: State, params: Iterable[Tensor]) -> list[Pending]:
    """Takes out of loaded state what `with_predictions` put into it."""
    pending = []
    for param in params:
        entry = state.get(param, {})
        if VERIFIED in entry:
            returns = {name: entry.pop(f"{PREDICTED}_{name}", None) for name in MOVED}
            known = {name: value for name, value in returns.items() if value is not None}
            known[PREDICTED], verified = entry.pop(PREDICTED), entry.pop(VERIFIED)
            if not is_managed(param):  # else `compare_whole` finds that it does not stand
                pending.append((param, entry, verified, known))
    return pending


@torch.no_grad()
def put_back(pending: Iterable[Pending]) -> None:
    """Puts predictions back where the verified weights stand, as often as it is asked.

    For a model may load its weights after the optimizer, over what was put back.
    """
    for param, entry, known, returns in pending:
        if torch.equal(fingerprint(param), known.to(param.device)):
            for name, value in returns.items():
                (param if name == PREDICTED else entry[name]).copy_(value)
