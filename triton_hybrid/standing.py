"""What stood in the weights before the prediction that stands there now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.fingerprint import fingerprint_of
from triton_hybrid.kernels.layout import dense_view
from triton_hybrid.kernels.ledger import FINGERPRINT_COLUMN, PART_COLUMN
from triton_hybrid.kernels.multi_tensor import assembled, remainder_of
from triton_hybrid.kernels.residue import recovered_torch
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.predictors.orthogonal import TURNED
from triton_hybrid.predictors.predictor import Choice
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules.rule import Rule
from triton_hybrid.shards import is_of_whole, local, prediction_of, whole_of
from triton_hybrid.state import (
    DIRECTION,
    MASTER,
    MOVE,
    PREDICTION,
    REMAINDER,
    RESIDUE,
    SNAPSHOT,
    Group,
    Member,
    as_dense,
    moved_again,
)


def fingerprint(param: Tensor) -> Tensor:
    """FP32 ``[2]``: of a parameter as it is now."""
    return fingerprint_of(dense_view(as_dense(param).detach()))


def is_written(param: Tensor, entry: Group) -> bool:
    """Whether a parameter is not as the last step noted it; False where nothing is noted."""
    noted = entry[PREDICTION.name][FINGERPRINT_COLUMN.value :]
    return bool(noted.any()) and not torch.equal(noted, fingerprint(param).to(noted.device))


def as_predicted(param: Tensor, entry: Group) -> bool:
    """Whether a parameter is as a prediction left it."""
    row = prediction_of(entry)
    if row is None:
        return False
    part, *noted = row[PART_COLUMN.value :].tolist()
    return part > 0 and any(noted) and not is_written(param, entry)


@torch.no_grad()
def compare_whole(param: Tensor, entry: Any) -> bool:
    """Compares parts with what the prediction of a whole parameter's checkpoint had left.

    All ranks that hold parts ask together. Where the weights are others, as those of a checkpoint
    written at the verified weights, no prediction stands in them.

    Returns:
        Whether that is so.
    """
    if not is_of_whole(entry):
        return False
    part, row = local(param.detach()), entry[PREDICTION.name].clone()
    noted = row[FINGERPRINT_COLUMN.value :]
    as_left = torch.equal(fingerprint(whole_of(part, param)), noted.to(part.device))
    row[PART_COLUMN.value] = float(as_left)
    noted.copy_(fingerprint(part) if as_left and part.numel() else torch.zeros_like(noted))
    entry[PREDICTION.name] = row
    return not as_left


def weight_before(param: Tensor, entry: Group, rule: UpdateRule) -> Tensor:
    """A parameter's weight before the prediction that stands, in the dtype of the mathematics."""
    if not moved_again(entry):
        snapshot: Tensor = entry[SNAPSHOT.name].to(param.device)
        return snapshot
    if MASTER.name in entry:
        # Written before a further prediction, an element is found by what would stand there.
        master, stands = entry[MASTER.name], weight_after(param, entry, rule).to(param.dtype)
        weight: Tensor = torch.where(stands == param, master, param.to(master.dtype))
        return weight
    found = torch.empty_like(param, dtype=entry[rule.writes[0]].dtype)
    dense = dense_view(as_dense(param).detach())
    kept, weight = NONE if dense.dtype != found.dtype else OWN, dense.to(found.dtype)
    if REMAINDER.name in entry:
        kept, weight = SPLIT, assembled(dense, dense_view(entry[REMAINDER.name]))
    residue = dense_view(entry[RESIDUE.name]).to(param.device)
    moved = _moved(param, entry, rule)
    dense_view(found).copy_(recovered_torch(weight, moved, residue, kept, param.dtype))
    return found


def _moved(param: Tensor, entry: Group, rule: UpdateRule) -> Tensor:
    """The displacement that stands in a parameter, 1-D in the order of memory."""
    displacement = TURNED if DIRECTION.name in entry else SlowEMA.displacement
    rows = {name: dense_view(entry[name]).to(param.device) for name in displacement.rows(rule)}
    return displacement.standing(rule, rows, entry[MOVE.name])


def weight_after(param: Tensor, entry: Group, rule: UpdateRule) -> Tensor:
    """What a 16-bit parameter with a master is the rounded value of, while a prediction stands."""
    master: Tensor = entry[MASTER.name]
    if not (moved_again(entry) and entry[PREDICTION.name][PART_COLUMN.value] > 0):
        return master
    found = torch.empty_like(master)
    dense_view(found).copy_(dense_view(master) + _moved(param, entry, rule))
    return found


def restore_weight(param: Tensor, entry: dict[str, Any], rule: UpdateRule) -> None:
    """Puts a parameter, and what is kept of its weight, back to before the prediction."""
    before = weight_before(param, entry, rule)
    param.copy_(before)
    if MASTER.name in entry:
        entry[MASTER.name].copy_(before)
    if REMAINDER.name in entry:
        entry[REMAINDER.name].copy_(remainder_of(before, param.detach()))


def continues(member: Member, entry: Group, rule: Rule, choice: Choice, masters: str) -> bool:
    """Whether what a predictor needs to judge the prediction in a parameter is there.

    ``masters``: how those of 16-bit parameters are kept, as in HybridOptimizer.
    """
    param, predictor = local(member.param), choice.active
    if PREDICTION.name not in entry or entry[PREDICTION.name][PART_COLUMN.value] == 0:
        return True
    again = moved_again(entry)
    if not predictor.predicts or again is not predictor.recomputes:
        return False
    # What a rank has nothing of is saved with the rows of either kind (`flat_shards.saved_rows`),
    # or without any (FSDP2).
    if not param.numel():
        return True
    rows = choice.rows_of_kind(rule, choice.kind_of(rule, member))
    if again and (DIRECTION.name in entry) != (DIRECTION in rows):
        return False
    own = masters == "auto" and param.dtype in (torch.float16, torch.bfloat16)
    needed = (MASTER if own else RESIDUE) if again else SNAPSHOT
    return needed.name in entry


def leave(param: Tensor, entry: dict[str, Any], rule: UpdateRule, standing: bool) -> bool:
    """Ends what predictions have to do with a parameter that is frozen, or no longer ours.

    Returns whether a prediction stood in it, or had before somebody wrote it.
    """
    if PREDICTION.name not in entry or not bool(entry[PREDICTION.name].any()):
        return False
    part = local(param.detach())
    tensors = {key: local(row) for key, row in entry.items() if isinstance(row, Tensor)}
    if standing and as_predicted(part, tensors):
        restore_weight(part, tensors, rule)
    stood = standing and bool(entry[PREDICTION.name][PART_COLUMN.value :][:1].any())
    entry[PREDICTION.name] = entry[PREDICTION.name].clone()
    entry[PREDICTION.name][PART_COLUMN.value :] = 0.0
    return stood
