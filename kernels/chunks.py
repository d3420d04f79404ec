"""Many tensors, one launch.

A launch over one tensor costs 8 to 10 µs of host time, and GPT-2 small has 148
tensors, so every kernel of this package works on a *list* of tensors at once. The
list is described by three tables in device memory:

* ``addresses``: int64, ``[rows, tensors]``. Row ``r`` holds the address of one role
  (parameter, gradient, moment, ...) of every tensor. In memory the roles of a tensor lie
  side by side, so that one register reaches them all.
* ``chunk_tensor`` and ``chunk_start``: which tensor a chunk belongs to, and at which
  element of that tensor it begins. A program takes the chunks
  ``program, program + programs, ...``, so who sums what is fixed, and the same inputs
  give the same bits.
* ``aligned``: whether every address of a tensor is a multiple of 16 bytes. Addresses
  loaded from a table carry no alignment for the compiler; the kernels promise it only
  where the host has looked.

The rows and what a kernel does with them are in ``rows.py``, tiling and launch options in
``launch.py``; all of it can be imported from here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import (
    INTERPRETED,
    LAUNCH,
    MAX_PROGRAMS,
    NUM_WARPS,
    REGISTERS,
    RESIDENT_LAUNCH,
    Tiling,
    default_tiling,
    gpu_tiling,
    launch_options,
    on_device,
)
from triton_hybrid.kernels.rows import (
    DIRECTION,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    HISTORY,
    MAX_HISTORY,
    N_ROWS,
    NONE,
    ORTHOGONAL,
    OWN,
    PARAM,
    ROW,
    ROWS,
    SCRATCH_ROWS,
    SLOW_EMA,
    SNAPSHOT,
    SPLIT,
    TAIL_SHARE,
    TRITON_DTYPES,
    WEIGHT,
    WEIGHT_EMA,
    load_row,
    load_weight,
    narrow,
    remaining,
    row_pointer,
    store_row,
    store_weight,
)

__all__ = [
    "DIRECTION",
    "EXP_AVG",
    "EXP_AVG_SQ",
    "GRAD",
    "HISTORY",
    "INTERPRETED",
    "LAUNCH",
    "MAX_HISTORY",
    "MAX_PROGRAMS",
    "NONE",
    "NUM_WARPS",
    "N_ROWS",
    "ORTHOGONAL",
    "OWN",
    "PARAM",
    "REFERENCE_BLOCK",
    "REGISTERS",
    "RESIDENT_LAUNCH",
    "ROW",
    "ROWS",
    "SCRATCH_ROWS",
    "SLOW_EMA",
    "SNAPSHOT",
    "SPLIT",
    "TAIL_SHARE",
    "TRITON_DTYPES",
    "WEIGHT",
    "WEIGHT_EMA",
    "ChunkTable",
    "TensorSet",
    "Tiling",
    "default_tiling",
    "dense_view",
    "gpu_tiling",
    "launch_options",
    "load_row",
    "load_weight",
    "narrow",
    "on_device",
    "remaining",
    "require_launchable",
    "row_pointer",
    "same_layout",
    "store_row",
    "store_weight",
    "upload",
]

# Elements that plain torch works on at a time: a block (2 MiB in FP32) stays in cache, so an
# update of many operations still reads and writes main memory about once. Measured on 2
# cores, AdamW with slow EMA on 124M parameters: 2^16 0.159 s, 2^17 0.151, 2^19 0.144.
REFERENCE_BLOCK = 1 << 19


def dense_view(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, as a 1-D view.

    Raises:
        ValueError: The tensor has gaps or overlaps in memory.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1 or not tensor.numel():
            continue
        if stride != expected:
            raise ValueError(
                f"tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense "
                "in memory: allowed are contiguous tensors and permutations of them"
            )
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of equal shape keep their elements in the same order."""
    return not left.numel() or all(
        a == b for a, b, size in zip(left.stride(), right.stride(), left.shape) if size != 1
    )


class ChunkTable:
    """Which program works on which part of which tensor, in device memory."""

    def __init__(
        self, lengths: Sequence[int], present: Sequence[bool], chunk: int, device: torch.device
    ) -> None:
        tensors: list[int] = []
        starts: list[int] = []
        first = [0]
        for index, (length, here) in enumerate(zip(lengths, present)):
            if here:
                begins = range(0, length, chunk)
                starts.extend(begins)
                tensors.extend([index] * len(begins))
            first.append(len(starts))
        self.count = len(starts)
        self.tensor = torch.tensor(tensors, dtype=torch.int32).to(device)
        self.start = torch.tensor(starts, dtype=torch.int64).to(device)
        self.first = torch.tensor(first, dtype=torch.int32).to(device)
        self.present = torch.tensor(list(present), dtype=torch.int32).to(device)


class TensorSet:
    """A list of tensors with all their roles, ready for one launch.

    All tensors of one role share a dtype; all roles of one tensor share its shape and its
    order in memory.

    Args:
        rows: Role name (one of ``ROWS``) to the tensors of that role, in one order.
            ``param`` is required; ``weight`` defaults to it.
        tiling: How to cut; the device's default when None.
        kept: How FP32 weights of 16-bit parameters are kept: ``SPLIT`` (with a row ``remainder``,
            BF16 only) or ``NONE``; None where they have a row of their own, or are the parameters.

    Raises:
        ValueError: Unknown role, wrong count, shape, layout, dtype or device.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Tensor]],
        tiling: Tiling | None = None,
        kept: int | None = None,
    ) -> None:
        params = list(rows["param"])
        if not params:
            raise ValueError("rows['param'] is empty: at least one tensor is needed")
        self.shapes = params
        self.device = params[0].device
        weights = rows.get("weight") or params
        self.kept = OWN if kept is None else kept
        wide = 4 if self.kept != OWN else weights[0].element_size()
        self.tiling = tiling or default_tiling(self.device, wide)
        self.lengths = [p.numel() for p in params]
        self.flat: dict[str, list[Tensor]] = {}
        self.dtype: dict[str, torch.dtype] = {}
        self.present = [True] * len(params)
        self._keep: dict[str, list[Tensor]] = {}
        self._address = [[0] * len(params) for _ in ROWS]
        self._changed = True
        self._chunks: OrderedDict[tuple[bool, ...], ChunkTable] = OrderedDict()
        self._lengths: Tensor | None = None
        self._addresses: Tensor | None = None
        self._aligned: Tensor | None = None
        if self.kept != OWN:
            self.dtype["weight"] = torch.float32
        for name, tensors in rows.items():
            self.set_row(name, list(tensors))
        if "weight" not in rows and self.kept == OWN:
            self.set_row("weight", params)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_row(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Gives every tensor its memory for one role; None leaves a tensor out of launches.

        A gradient in another memory order than its parameter is copied into that order.
        """
        if name not in ROW:
            raise ValueError(f"row {name!r}: must be one of {ROWS}")
        if len(tensors) != len(self):
            raise ValueError(f"row {name!r} has {len(tensors)} tensors: must be {len(self)}")
        flat: list[Tensor] = []
        keep: list[Tensor] = []
        dtype: torch.dtype | None = None
        for index, (tensor, like) in enumerate(zip(tensors, self.shapes)):
            if tensor is None:
                if name != "grad":
                    raise ValueError(
                        f"row {name!r}, tensor {index}: None, allowed only for 'grad'; every "
                        "other role needs a tensor"
                    )
                flat.append(like.new_empty(0))
                continue
            if tensor.shape != like.shape or tensor.device != like.device:
                raise ValueError(
                    f"row {name!r}, tensor {index}: shape {tuple(tensor.shape)} on "
                    f"{tensor.device}, "
                    f"must be {tuple(like.shape)} on {like.device}"
                )
            if dtype is None:
                dtype = tensor.dtype
            known = dtype in TRITON_DTYPES or (name == "remainder" and dtype == torch.int16)
            if tensor.dtype != dtype or not known:
                raise ValueError(
                    f"row {name!r}, tensor {index}: dtype {tensor.dtype}, must be {dtype} as the "
                    f"first of the row and one of {list(TRITON_DTYPES)}"
                )
            if name != "param" and not same_layout(tensor, like):
                if name != "grad":
                    raise ValueError(
                        f"row {name!r}, tensor {index}: strides {tensor.stride()}, must be those "
                        f"of its parameter, {like.stride()}"
                    )
                tensor = torch.empty_like(like, dtype=dtype).copy_(tensor)
                keep.append(tensor)
            try:
                flat.append(dense_view(tensor.detach()))
            except ValueError as error:
                raise ValueError(f"row {name!r}, tensor {index}: {error}") from None
        if dtype is not None:
            self._require_one_width(name, dtype)
        self._keep[name] = keep
        self.flat[name] = flat
        if dtype is not None:
            self.dtype[name] = dtype
        if name == "grad":
            self.present = [tensor is not None for tensor in tensors]
        address = [view.data_ptr() if view.numel() else 0 for view in flat]
        if address != self._address[ROW[name]]:
            self._address[ROW[name]] = address
            self._changed = True

    def _require_one_width(self, name: str, dtype: torch.dtype) -> None:
        """Kernels read weight and state with one dtype; another would be read as garbage."""
        known = {**self.dtype, name: dtype}
        weight = known.get("weight")
        for row, state in known.items():
            if weight is None or row in ("param", "grad", "weight", "remainder", *SCRATCH_ROWS):
                continue
            if weight not in (torch.float32, torch.float64):
                raise ValueError(
                    f"row 'weight': dtype {weight}, must be torch.float32 or torch.float64 where "
                    f"there is a row {row!r}: a 16-bit parameter needs a master"
                )
            if state != weight:
                raise ValueError(f"row {row!r}: dtype {state}, must be {weight} as 'weight'")

    def announce(self, name: str, dtype: torch.dtype) -> None:
        """Says that the tensors have a role whose memory comes by a later `set_row`."""
        self._require_one_width(name, dtype)
        self.dtype[name] = dtype
        self.release(name)

    def release(self, name: str) -> None:
        """Lets go of a role's memory until the next `set_row`; its addresses stay known."""
        empty = self.shapes[0].new_empty(0)
        self.flat[name] = [empty] * len(self)
        self._keep[name] = []

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """``addresses`` [rows, tensors], ``lengths`` [tensors], ``aligned`` [tensors].

        Uploaded only after a change, and without waiting for the device.
        """
        if self._lengths is None:
            self._lengths = torch.tensor(self.lengths, dtype=torch.int64).to(self.device)
        if self._changed or self._addresses is None or self._aligned is None:
            aligned = [int(all(a % 16 == 0 for a in column)) for column in zip(*self._address)]
            columns = torch.tensor(list(zip(*self._address)), dtype=torch.int64)
            self._addresses = upload(columns, self.device).t()
            self._aligned = upload(torch.tensor(aligned, dtype=torch.int32), self.device)
            self._changed = False
        return self._addresses, self._lengths, self._aligned

    def chunks(self, every: bool = False) -> ChunkTable:
        """The chunk table of the tensors with a gradient, or of every tensor."""
        key = (True,) * len(self) if every else tuple(self.present)
        table = self._chunks.get(key)
        if table is None:
            table = ChunkTable(self.lengths, key, self.tiling.chunk, self.device)
            self._chunks[key] = table
            # A model whose unused parameters differ from step to step must not grow a table
            # for each pattern.
            if len(self._chunks) > 8:
                self._chunks.popitem(last=False)
        else:
            self._chunks.move_to_end(key)
        return table

    def reference_blocks(self, index: int) -> Iterator[slice]:
        """Slices of one tensor for plain torch, small enough to stay in cache."""
        for begin in range(0, self.lengths[index], REFERENCE_BLOCK):
            yield slice(begin, min(begin + REFERENCE_BLOCK, self.lengths[index]))

    def weight(self, index: int, part: slice) -> Tensor:
        """Weights of one tensor for plain torch, in the dtype of the mathematics.

        To be changed in place and handed to `put_weight`: where they are kept otherwise, this is
        a copy.
        """
        if self.kept == OWN:
            return self.flat["weight"][index][part]
        param = self.flat["param"][index][part]
        if self.kept == NONE:
            return param.float()
        return assembled(param, self.flat["remainder"][index][part])

    def put_weight(self, index: int, part: slice, weight: Tensor) -> None:
        """Keeps the weights that `weight` returned, and rounds the parameters."""
        if not self.has_master:
            return
        param = self.flat["param"][index][part]
        param.copy_(weight)
        if self.kept == SPLIT:
            self.flat["remainder"][index][part].copy_(remainder_of(weight, param))

    def dtype_of(self, name: str) -> tl.dtype:
        """The Triton dtype of a role; FP32 where the role is absent and so never read."""
        return TRITON_DTYPES[self.dtype.get(name, torch.float32)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the mathematics is done in: FP32, or FP64 for FP64 parameters."""
        return torch.float64 if self.dtype["weight"] == torch.float64 else torch.float32

    def has(self, name: str) -> bool:
        """Whether the tensors have memory for a role."""
        return name in self.dtype

    @property
    def has_master(self) -> bool:
        """Whether a weight of its own stands behind every parameter."""
        return self.dtype["weight"] != self.dtype["param"]


def assembled(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 masters of BF16 parameters from what is missing in them (see `store_weight`)."""
    high = param.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


def remainder_of(weight: Tensor, param: Tensor) -> Tensor:
    """What BF16 parameters lack of their FP32 masters; int16."""
    high = param.view(torch.int16).to(torch.int32) << 16
    return (weight.view(torch.int32) - high).clamp(max=32767).to(torch.int16)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to the device without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    # A fresh pinned buffer each time: its allocator does not hand it out again before the
    # copy has run, so no earlier copy is overwritten in flight.
    return host.pin_memory().to(device, non_blocking=True)


def require_launchable(device: torch.device) -> None:
    """Refuses a launch that Triton could not run.

    Raises:
        ValueError: CPU tensors without the interpreter.
    """
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "backend='triton' on CPU tensors: allowed only with TRITON_INTERPRET=1 set before "
            "triton_hybrid is imported; use backend='torch' or 'auto', or move the parameters "
            "to a GPU"
        )
