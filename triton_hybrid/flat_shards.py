"""Parameters of FSDP1 (``FullyShardedDataParallel``): each rank has other 1-D pieces of them.

With ``use_orig_params=True`` a parameter is a view of what of it lies on the rank, often nothing;
without, several parameters are one. FSDP1 marks both and says to nobody how they are cut, so its
handles are looked for among the objects that live.
"""

from __future__ import annotations

import gc
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from triton_hybrid.distributed import Ranks
from triton_hybrid.state import DECLARED, REMAINDER, RESIDUE, STEP, State, wide

_HANDLES: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
_INTEGERS = {4: (torch.int32, torch.float32), 8: (torch.int64, torch.float64)}
_NARROW = {RESIDUE.name: torch.int8, REMAINDER.name: torch.int16}


def handle_of(param: Any) -> Any:
    """The handle that says how FSDP1 has cut a parameter; None for others.

    Raises:
        NotImplementedError: FSDP1 marked it, and its module is no more.
    """
    if not getattr(param, "_fsdp_flattened", False):
        return None
    handle = _HANDLES[param]() if param in _HANDLES else None
    if handle is None:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for found in [its for its in gc.get_objects() if type(its) is FlatParamHandle]:
            flat = found.flat_param
            for its in (flat, *(flat._params or ()), *(flat._shared_params or ())):
                _HANDLES[its] = weakref.ref(found)
        handle = _HANDLES[param]() if param in _HANDLES else None
    if handle is None:
        raise NotImplementedError("params: a parameter of FSDP1 whose module is no more")
    return handle


def is_cut(param: Any) -> bool:
    """Whether FSDP1 keeps other pieces of a parameter on other ranks."""
    handle = handle_of(param)
    return handle is not None and bool(handle.uses_sharded_strategy)


class Piece(NamedTuple):
    """What of a parameter of FSDP1 lies on this rank: a piece of it, flattened."""

    shape: torch.Size  # of the whole
    here: slice
    group: Any  # of the ranks that hold the other pieces

    def whole(self, part: Tensor) -> Tensor:
        """The whole, from the part of every rank of the group, which all call this."""
        flat = part.new_zeros(self.shape.numel())
        flat[self.here] = part
        dist.all_reduce(flat, group=self.group)
        return flat.view(self.shape)


def piece_of(param: Any) -> Piece | None:
    """The piece of a parameter that this rank has; None where it has the whole, or of several."""
    if not is_cut(param):
        return None
    flat = (handle := handle_of(param)).flat_param
    pieces = zip(flat._params or (), flat._shard_param_infos, flat._shapes)
    for piece, its, shape in pieces:
        if piece is param:
            end = its.intra_param_end_idx + 1 if its.in_shard else 0
            here = slice(its.intra_param_start_idx if its.in_shard else 0, end)
            return Piece(shape, here, handle.process_group)
    return None


def whole_shape(param: Any) -> torch.Size:
    """The shape of a parameter as a whole."""
    piece = piece_of(param)
    shape: torch.Size = param.shape if piece is None else piece.shape
    return shape


def check_flat(param: Any, index: int, base: str) -> None:
    """Refuses what cannot be updated piece by piece with a NotImplementedError."""
    handle = handle_of(param)
    if handle is not None and handle._offload_params:
        raise NotImplementedError(
            f"params: parameter {index} is of FSDP1 with CPUOffload(offload_params=True): must be "
            "without, it is not built"
        )
    if base == "muon" and handle is not None and param is handle.flat_param:
        raise NotImplementedError(
            f"base='muon' of parameter {index}: FSDP1 (FullyShardedDataParallel) has made one "
            "parameter of several; must be 'adamw' or 'lion', or wrap with use_orig_params=True"
        )


def share_of(param: Any, index: int, world: int) -> float:
    """One over the number of ranks that hold the same elements of a parameter of FSDP1."""
    handle = handle_of(param)
    parts, kind = handle.process_group.size(), handle._sharding_strategy.name
    if not is_cut(param):
        return 1.0 / world
    if parts != world and ("HYBRID" not in kind or world % parts):
        raise NotImplementedError(
            f"params: parameter {index} lies on {parts} ranks ({kind}), and {world} decide "
            "together: process_group must be the group of all ranks that hold the parameters"
        )
    return float(parts / world)


def layout_number(params: Iterable[Any]) -> int:
    """A number for the shapes of whole parameters, which must be the same on all ranks."""
    handles = [(param, handle_of(param)) for param in params]
    shapes = [
        tuple(param.shape if handle is None else handle.flat_param._unpadded_unsharded_size)
        for param, handle in handles
    ]
    return zlib.crc32(repr(shapes).encode())


def flat_gradient(param: Any) -> Any:
    """Of a plain parameter; of one of FSDP1 also where this rank has nothing of it.

    ``grad`` is None there; but whether a tensor has a gradient must be the same on all ranks.
    """
    grad = gradient_beside(param)
    return grad if grad is None or grad is param.grad else param.detach()


def gradient_beside(param: Any) -> Any:
    """A parameter's gradient; where FSDP1 left this rank nothing of it, that of the same flat one.

    Those of one flat parameter have gradients together; where no piece is here, padding has.
    """
    if param.grad is not None or param.numel() or (handle := handle_of(param)) is None:
        return param.grad
    flat = handle.flat_param
    pieces = zip(flat._params or (), flat._shard_param_infos)
    return next((piece for piece, its in pieces if its.in_shard and piece.requires_grad), flat).grad


def saved_rows(param: Tensor, entry: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """State as ``FSDP.optim_state_dict`` can take it; `joined` is the inverse.

    It takes tensors for tensors like the parameter, all of one dtype, and scalars that are equal to
    themselves, as NaN is not: small rows become the bits of their numbers, each by itself. And it
    takes the same rows of all parameters: of ``names`` those that one does not keep are NaN.
    """
    missing = [name for name in names if name not in entry] if entry else []
    nothing = {name: torch.full_like(param, torch.nan, dtype=wide(param, {})) for name in missing}
    found: dict[str, Any] = nothing
    for key, value in entry.items():
        row = DECLARED.get(key)
        if not isinstance(value, Tensor) or row is None or row is STEP:
            found[key] = value
        elif row.shape is None:
            found[key] = value if value.is_floating_point() else value.to(wide(param, {}))
        else:
            bits = value.reshape(-1).view(_INTEGERS[value.element_size()][0])
            found |= {f"{key}.{place}": bit for place, bit in enumerate(bits.unbind())}
    return found


def joined(entry: Mapping[str, Any]) -> dict[str, Any]:
    """State as it is kept, from what `saved_rows` made of it or anybody else has saved."""
    found: dict[str, Any] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in entry.items():
        name, _, place = key.rpartition(".")
        if isinstance(value, dict) and key in DECLARED:  # flattened and nested again
            parts[key] = value
        elif name in DECLARED:
            parts.setdefault(name, {})[place] = value
        elif like_param(key, value) and _is_filler(value):
            continue
        elif key in _NARROW and isinstance(value, Tensor):
            found[key] = value.to(_NARROW[key])
        else:
            found[key] = value
    for name, its in parts.items():
        bits = torch.stack([its[place] for place in sorted(its, key=int)])
        numbers = bits.view(_INTEGERS[bits.element_size()][1])
        found[name] = numbers if DECLARED[name].shape else numbers[0]
    return found


def _is_filler(value: Tensor) -> bool:
    """Whether `saved_rows` has put a row there that the parameter does not keep."""
    # Of a DTensor, which never is one, this rank may have nothing, all of which is NaN.
    return not hasattr(value, "placements") and value.numel() > 0 and bool(value.isnan().all())


def fill_empty(state: State, params: Sequence[Tensor], ranks: Ranks) -> None:
    """Gives parameters of which this rank has nothing the numbers that others have loaded for them.

    FSDP1 loads nothing there, and decisions are made of the numbers of all tensors. All ranks that
    decide together call this.
    """
    cut = [param for param in params if is_cut(param)]
    if not cut or not ranks.together:
        return
    own: dict[int, dict[str, Any]] = {
        place: {
            key: value.dtype if like_param(key, value) else _on_host(value)
            for key, value in state[param].items()
        }
        for place, param in enumerate(cut)
        if param.numel() and param in state
    }
    everybody: list[Any] = [None] * ranks.size
    dist.all_gather_object(everybody, own, group=ranks.group)
    for place, param in enumerate(cut):
        entries = [its[place] for its in everybody if place in its]
        for key, value in (entries[0] if entries and not param.numel() else {}).items():
            if isinstance(value, torch.dtype):
                value = torch.empty_like(param, dtype=value)
            elif isinstance(value, Tensor):
                value = value.to(param.device)
            state[param].setdefault(key, value)


def like_param(key: str, value: Any) -> bool:
    """Whether an entry of state is a row like its parameter."""
    row = DECLARED.get(key)
    return row is not None and row.shape is None and isinstance(value, Tensor)


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
