"""What stood in the weights before the prediction that stands there now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import Settings
from triton_hybrid.kernels.layout import dense_view
from triton_hybrid.kernels.ledger import PART_COLUMN
from triton_hybrid.kernels.multi_tensor import assembled, remainder_of
from triton_hybrid.kernels.residue import moved_torch, recovered_torch
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.shards import local
from triton_hybrid.state import (
    MASTER,
    MOVE,
    PREDICTION,
    REMAINDER,
    RESIDUE,
    SNAPSHOT,
    Group,
    Member,
    as_dense,
    as_predicted,
)


def moved_again(entry: Group) -> bool:
    """Whether the displacement that stands in a parameter can be computed again."""
    move = entry.get(MOVE.name)
    return move is not None and move.shape == MOVE.shape and not bool(move[0].isnan())


def weight_before(param: Tensor, entry: Group, rule: UpdateRule) -> Tensor:
    """A parameter's weight before the prediction that stands, in the dtype of the mathematics."""
    if not moved_again(entry):
        snapshot: Tensor = entry[SNAPSHOT.name].to(param.device)
        return snapshot
    if MASTER.name in entry:
        master: Tensor = entry[MASTER.name]
        return master
    found = torch.empty_like(param, dtype=entry[rule.writes[0]].dtype)
    dense = dense_view(as_dense(param).detach())
    kept, weight = NONE if dense.dtype != found.dtype else OWN, dense.to(found.dtype)
    if REMAINDER.name in entry:
        kept, weight = SPLIT, assembled(dense, dense_view(entry[REMAINDER.name]))
    names = ("slow_ema", *rule.reads_along, RESIDUE.name)
    rows = {name: dense_view(entry[name]).to(param.device) for name in names}
    moved = moved_torch(rule, rows, entry[MOVE.name])
    before = recovered_torch(weight, moved, rows[RESIDUE.name], kept, param.dtype)
    dense_view(found).copy_(before)
    return found


def weight_after(param: Tensor, entry: Group, rule: UpdateRule) -> Tensor:
    """What a 16-bit parameter with a master is the rounded value of, while a prediction stands."""
    master: Tensor = entry[MASTER.name]
    if not (moved_again(entry) and entry[PREDICTION.name][PART_COLUMN.value] > 0):
        return master
    found = torch.empty_like(master)
    names = ("slow_ema", *rule.reads_along)
    rows = {name: dense_view(entry[name]).to(param.device) for name in names}
    dense_view(found).copy_(dense_view(master) + moved_torch(rule, rows, entry[MOVE.name]))
    return found


def restore_weight(param: Tensor, entry: dict[str, Any], rule: UpdateRule) -> None:
    """Puts a parameter, and what is kept of its weight, back to before the prediction."""
    before = weight_before(param, entry, rule)
    param.copy_(before)
    if MASTER.name in entry:
        entry[MASTER.name].copy_(before)
    if REMAINDER.name in entry:
        entry[REMAINDER.name].copy_(remainder_of(before, param.detach()))


def continues(member: Member, entry: dict[str, Any], settings: Settings) -> bool:
    """Whether what is needed to judge the prediction in a parameter is there."""
    if PREDICTION.name not in entry or entry[PREDICTION.name][PART_COLUMN.value] == 0:
        return True
    again = moved_again(entry)
    follows = settings.config.predictor in ("linear", "secant") or (MOVE.name in entry)
    if not again:
        return follows and SNAPSHOT.name in entry
    if settings.config.predictor not in ("slow_ema", "auto"):
        return False
    sixteen_bit = member.param.dtype in (torch.float16, torch.bfloat16)
    own = sixteen_bit and settings.master_weights == "auto"
    return (MASTER.name if own else RESIDUE.name) in entry


def leave(param: Tensor, entry: dict[str, Any], rule: UpdateRule, standing: bool) -> None:
    """Ends what predictions have to do with a parameter that is frozen, or no longer ours."""
    if PREDICTION.name not in entry:
        return
    part = local(param.detach())
    tensors = {key: local(row) for key, row in entry.items() if isinstance(row, Tensor)}
    if standing and as_predicted(part, tensors):
        restore_weight(part, tensors, rule)
    entry[PREDICTION.name] = entry[PREDICTION.name].clone()
    entry[PREDICTION.name][PART_COLUMN.value :] = 0.0
