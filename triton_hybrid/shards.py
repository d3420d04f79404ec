"""Parameters that are DTensors, or FSDP1's: each rank works on its own part of them.

FSDP2 (``fully_shard``) and tensor parallel training hand the optimizer DTensors. The kernels work
on what of them lies on this rank, and what they measure is summed over the ranks before anything
is decided (`Ranks.reduce`). The optimizer's state holds DTensors like the parameters, so that
distributed checkpoints save, load and reshard it.

Nothing else knows of DTensors: here they are taken apart and put together again. What FSDP1 has cut
are plain tensors (`flat_shards`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.distributed import Ranks
from triton_hybrid.flat_shards import (
    flat_gradient,
    handle_of,
    is_cut,
    like_param,
    piece_of,
    saved_rows,
    share_of,
)
from triton_hybrid.kernels.ledger import FINGERPRINT_COLUMN, PART_COLUMN
from triton_hybrid.kernels.residue import UNMOVED
from triton_hybrid.state import (
    MASTER,
    PREDICTION,
    REMAINDER,
    RESIDUE,
    SNAPSHOT,
    Member,
    State,
    adopt_parameter,
)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def version_of(tensor: Any) -> int:
    """A number that grows with each write in place.

    Autograd adds to a DTensor as a whole, fully_shard to the part alone: one version stays.
    """
    own = int(tensor._version)
    return own + int(tensor._local_tensor._version) if is_dtensor(tensor) else own


def is_managed(param: Any) -> bool:
    """Whether others may have laid a parameter out over ranks: a DTensor, or one of FSDP1."""
    return is_dtensor(param) or handle_of(param) is not None


@torch.no_grad()
def local(tensor: Any) -> Any:
    """What of a tensor lies on this rank, in the same memory; what is no DTensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


@torch.no_grad()
def local_gradient(param: Any) -> Any:
    """This rank's part of a parameter's gradient, laid out as the parameter."""
    if not is_dtensor(param):
        return flat_gradient(param)
    grad, to = param.grad, param.placements
    if is_dtensor(grad) and grad.placements != to:
        grad = grad.redistribute(param.device_mesh, to)
    return local(grad)


@torch.no_grad()
def like_whole(part: Tensor, whole: Any) -> Tensor:
    """A DTensor laid out as another, in the memory of this rank's part."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


@torch.no_grad()
def whole_of(part: Tensor, param: Any) -> Tensor:
    """A whole tensor, from the parts of all ranks, which lie as a parameter's do."""
    if (piece := piece_of(param)) is not None:
        return piece.whole(part)
    gathered: Any = like_whole(part.contiguous(), param)
    whole: Tensor = gathered.full_tensor().contiguous()
    return whole


def part_group(param: Any) -> Any:
    """The ranks that hold the parts of a parameter; of a mesh, its first dimension that cuts."""
    if (piece := piece_of(param)) is not None:
        return piece.group
    mesh = param.device_mesh
    cuts = enumerate(param.placements)
    return mesh.get_group(next(d for d, p in cuts if _is_cut_by(p) and mesh.size(d) > 1))


@torch.no_grad()
def part_of(tensor: Tensor, whole: Any) -> Tensor:
    """What lies on this rank of a tensor that every rank has, laid out as a parameter."""
    if (piece := piece_of(whole)) is not None:
        return tensor.flatten()[piece.here]
    from torch.distributed.tensor import DTensor, Replicate

    mesh = whole.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part: Tensor = local(everywhere.redistribute(mesh, whole.placements))
    return part


@torch.no_grad()
def placed(key: str, value: Tensor, param: Any, device: torch.device) -> Tensor:
    """A copy of a checkpoint's tensor on a device, laid out as its parameter."""
    if is_dtensor(param) and not is_dtensor(value) and like_param(key, value):
        return like_whole(part_of(value.to(device=device), param).clone(), param)
    return value.detach().to(device=device, copy=True)


OF_WHOLE = 2.0
"""In the place of a 1 in the table of predictions: the fingerprint beside it is not that of parts,
but how a prediction left the whole parameter of which the checkpoint was."""


def prediction_of(entry: Any) -> Tensor | None:
    """What a parameter's state says of its prediction; None of those of other versions."""
    row: Tensor | None = entry.get(PREDICTION.name) if isinstance(entry, dict) else None
    return None if row is None or row.shape != PREDICTION.shape else row


def is_of_whole(entry: Any) -> bool:
    """Whether a parameter's fingerprint is that of a whole one, and this one is there in parts."""
    row = prediction_of(entry)
    return row is not None and float(row[PART_COLUMN.value]) == OF_WHOLE


def forget_fingerprints(param: Any, entry: dict[str, Any]) -> None:
    """Of saved parts: those of other parts would be those of other weights."""
    if is_managed(param) and PREDICTION.name in entry and not is_of_whole(entry):
        entry[PREDICTION.name] = entry[PREDICTION.name].clone()
        entry[PREDICTION.name][FINGERPRINT_COLUMN.value :] = 0.0


def mark_fingerprint(param: Any, entry: dict[str, Any]) -> None:
    """Of what was loaded: checkpoints of parts have no fingerprints, so one is that of a whole."""
    row = prediction_of(entry)
    if row is None or not row[PART_COLUMN.value] > 0:
        return
    whole = is_managed(param) and bool(row[FINGERPRINT_COLUMN.value :].any())
    row[PART_COLUMN.value] = OF_WHOLE if whole else 1.0


@torch.no_grad()
def fold_writes(param: Any, entry: dict[str, Any]) -> None:
    """Lets rows say what others wrote to this rank's part of a parameter while a prediction stands.

    Which parts they wrote is a number of each rank, of which checkpoints keep one: who loads them
    would take what was written for the prediction. As it stands, it is no part of the move.
    """
    part = prediction_of(entry)
    if part is None or part[PART_COLUMN.value] >= 0:
        return
    entry[PREDICTION.name] = part.clone()
    entry[PREDICTION.name][PART_COLUMN.value] = 1.0
    if RESIDUE.name in entry:
        entry[RESIDUE.name] = torch.full_like(entry[RESIDUE.name], UNMOVED)
    if SNAPSHOT.name in entry:
        weight = entry.get(MASTER.name, param).detach()
        entry[SNAPSHOT.name] = weight.to(entry[SNAPSHOT.name].dtype, copy=True)
        adopt_parameter(param, entry[SNAPSHOT.name])


def saved_parts(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], stands: bool
) -> dict[str, Any]:
    """A state dict that any number of ranks can load; ``stands``: whether a prediction does."""
    params = [param for group in groups for param in group["params"]]
    if not any(map(is_managed, params)):
        return state_dict
    state = dict(state_dict["state"])
    flat = [state.get(index, {}) for index, param in enumerate(params) if handle_of(param)]
    names = sorted({key for its in flat for key, value in its.items() if like_param(key, value)})
    for index, param in enumerate(params):
        if index in state:
            state[index] = dict(state[index])
            if stands:
                fold_writes(param, state[index])
            forget_fingerprints(param, state[index])
            if is_dtensor(param) and REMAINDER.name in state[index]:
                # Torch's collectives know no 16-bit integers; loading undoes it.
                state[index][REMAINDER.name] = state[index][REMAINDER.name].float()
            if handle_of(param) is not None:
                state[index] = saved_rows(param, state[index], names)
    return {**state_dict, "state": state}


def _is_cut_by(place: Any) -> bool:
    """Whether a placement cuts, also what is cut by `ColwiseParallel` already, which is strided."""
    return place.is_shard() or type(place).__name__ == "_StridedShard"


def check_dtensor(param: Any, index: int) -> None:
    """Refuses a DTensor that cannot be updated part by part with a NotImplementedError."""
    odd = [place for place in param.placements if not (place.is_replicate() or _is_cut_by(place))]
    if odd:
        raise NotImplementedError(
            f"params: parameter {index} has placements {tuple(param.placements)}: must be Shard or "
            "Replicate"
        )
    device = local(param).device.type
    if device != param.device_mesh.device_type:
        raise NotImplementedError(
            f"params: the parts of parameter {index} lie on {device}, and its mesh is of "
            f"{param.device_mesh.device_type}: CPU offload of sharded parameters is not built; use "
            "fully_shard without CPUOffloadPolicy"
        )


def is_part(param: Any) -> bool:
    """Whether other ranks hold other parts of a parameter."""
    if not is_dtensor(param):
        return is_cut(param)
    sizes = [param.device_mesh.size(dim) for dim in range(param.device_mesh.ndim)]
    return any(_is_cut_by(place) and size > 1 for place, size in zip(param.placements, sizes))


def _share(param: Any, index: int, ranks: Ranks) -> float:
    """One over the number of ranks that hold the same elements of a parameter."""
    if handle_of(param) is not None:
        return share_of(param, index, ranks.size)
    if not is_dtensor(param):
        return 1.0 if ranks.apart else 1.0 / ranks.size
    mesh = param.device_mesh
    if mesh.size() != ranks.size:
        raise NotImplementedError(
            f"params: parameter {index} lies on {mesh.size()} ranks, and {ranks.size} decide "
            "together: process_group must be the group of all ranks that hold the parameters"
        )
    same = [mesh.size(dim) for dim, place in enumerate(param.placements) if place.is_replicate()]
    count = 1
    for size in same:
        count *= size
    return 1.0 / count


@torch.no_grad()
def by_share(params: Sequence[Tensor], ranks: Ranks) -> tuple[dict[float, list[Tensor]], bool]:
    """This rank's gradients, by one over the number of ranks that hold the same.

    Returns:
        The gradients, and whether they are parts of those of all ranks together; where they are
        not, all of them are at 1.

    Raises:
        RuntimeError: FSDP1 has not reduced them.
    """
    some = any(map(is_part, params))
    found: dict[float, list[Tensor]] = {}
    for place, param in enumerate(params):
        grad = local_gradient(param)
        if grad is None:
            continue
        if some and grad.shape != local(param).shape:
            raise RuntimeError(
                "accumulation inside no_sync() of FSDP1: every rank has a whole gradient of its "
                "own there, which is not measured; call backward() outside of it"
            )
        found.setdefault(_share(param, place, ranks) if some else 1.0, []).append(grad)
    return found, some


OTHERS = "others"


def _others(member: Member) -> Member:
    """A tensor without elements, for what is measured of the parameters of other ranks.

    Tables of sums have a row for each tensor; in this one's stands what the other ranks have found.
    """
    nothing = member.param.new_empty(0)
    group = {**member.group, "base": "adamw", OTHERS: True}
    return member._replace(param=nothing, whole=nothing, group=group)


class Shards:
    """The parameters of an optimizer as this rank holds them, with their state.

    Args:
        members: Every parameter that may get a gradient.
        state: The optimizer's state.
        ranks: Who decides together.

    Attributes:
        members: The same, on what lies on this rank.
        state: Their state; that of plain parameters is the optimizer's own.
        some: Whether other ranks hold other parts of a parameter, or other parameters.

    Raises:
        NotImplementedError: Parameters that lie on other ranks than those that decide together.
    """

    def __init__(self, members: Sequence[Member], state: State, ranks: Ranks) -> None:
        self._outer, self._whole = state, members
        self.some = any(is_part(member.param) for member in members)
        self.members: list[Member] = []
        self.state: State = defaultdict(dict)
        for member in members:
            param, share = member.param, _share(member.param, member.place, ranks)
            part = local(param)
            self.members.append(member._replace(param=part, share=share))
            # Asked for by key: a fresh optimizer makes the entry.
            entry = state[param]
            if is_dtensor(param):
                entry = {
                    key: local(value) if isinstance(value, Tensor) else value
                    for key, value in entry.items()
                }
            self.state[part] = entry
        if ranks.apart and ranks.together:
            self.some = True
            self.members.append(_others(members[0]))

    def publish(self) -> None:
        """Gives the optimizer's state DTensors in the memory of what the kernels work on."""
        for member, whole in zip(self.members, self._whole):
            if not is_dtensor(whole.param):
                continue
            entry, found = self._outer[whole.param], self.state[member.param]
            for key in entry.keys() - found.keys():
                del entry[key]
            for key, value in found.items():
                entry[key] = like_whole(value, whole.param) if like_param(key, value) else value


def all_zero(params: Iterable[Tensor]) -> bool:
    """Whether no parameter has a gradient that is not zero. Waits for the device."""
    grads = (local(param.grad) for param in params if param.grad is not None)
    return not any(bool(grad.any()) for grad in grads)


def only_initialises(members: Sequence[Member], ranks: Ranks) -> bool:
    """Whether a first step only creates state; asked by all ranks, where one is.

    Distributed checkpointing calls `step()` once with learning rate 0 and zero gradients, and
    expects every state key afterwards and nothing else to have moved.
    """
    if any(float(member.group["lr"]) != 0.0 for member in members):
        return False
    params = [member.param for member in members]
    found = [not all_zero(params), any(param.grad is not None for param in params)]
    if ranks.apart or any(map(is_part, params)):
        # Zero here alone may be the part of a gradient that is not, and so may be none.
        others = torch.tensor(found, dtype=torch.float64, device="cpu")
        found = ranks.reduce(others.to(local(params[0]).device)).tolist()
    return bool(found[1]) and not found[0]


def reshard(module: Any) -> None:
    """Lets every FSDP module in a module go back to its parts; nothing happens to other modules.

    After a forward pass without a backward pass (an evaluation) the root module of ``fully_shard``
    or FSDP1 keeps its gathered weights, and the next forward pass would use them, whatever `step`,
    `verified_weights` or `train` have made of the parts since.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and part._is_root is not None:
            handle = part._handle
            if handle is not None and handle.uses_sharded_strategy:
                _reshard(part, handle, free_unsharded_flat_param=True)
