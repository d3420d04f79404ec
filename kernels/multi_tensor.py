"""Many tensors, one launch.

A launch over one tensor costs 8 to 10 µs of host time, and GPT-2 small has 148 tensors, so every
kernel works on a *list* of tensors at once, described by tables in device memory:

* ``addresses``: int64, ``[tensors, MOST_ROWS]``, of each row (parameter, gradient, moment, ...);
  those of a tensor lie side by side, so that one register reaches them all.
* ``places``: int64, ``[chunks, 2]``: the tensor of a chunk, and the element at which it begins.
  A program takes the chunks ``program, program + programs, ...``, so who sums what is fixed, and
  the same inputs give the same bits.
* ``extents``: int64, ``[tensors]``: twice the length of a tensor, and one more where each of its
  addresses is a multiple of 16 bytes. Addresses loaded from a table carry no alignment for the
  compiler; the kernels promise it only where the host has looked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.addresses import AddressTable
from triton_hybrid.kernels.capture import NEVER_RUN, refuse_capture
from triton_hybrid.kernels.launch import (
    LAUNCH,
    Launch,
    Tiling,
    default_tiling,
    prepared,
    start,
)
from triton_hybrid.kernels.layout import DenseViews, dense_view, same_layout
from triton_hybrid.kernels.likeness import likeness
from triton_hybrid.kernels.rows import NONE, OWN, OWN_DTYPE, ROW, SPLIT, TRITON_DTYPES

if TYPE_CHECKING:
    from triton_hybrid.kernels.matrices import MatrixSet
    from triton_hybrid.kernels.update_rule import UpdateRule

# Elements that plain torch works on at a time: a block (2 MiB in FP32) stays in cache, so an
# update of many operations still reads and writes main memory about once. Measured on 2
# cores, AdamW with slow EMA on 124M parameters: 2^16 0.159 s, 2^17 0.151, 2^19 0.144.
TORCH_BLOCK = 1 << 19


class ChunkTable:
    """Which program works on which part of which tensor, in device memory."""

    def __init__(
        self, lengths: Sequence[int], present: Sequence[bool], chunk: int, device: torch.device
    ) -> None:
        places: list[tuple[int, int]] = []
        first = [0]
        for index, (length, here) in enumerate(zip(lengths, present)):
            places.extend((index, begin) for begin in range(0, length if here else 0, chunk))
            first.append(len(places))
        self.count = len(places)
        self.places = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2)
        self.first = torch.tensor(first, dtype=torch.int32, device=device)
        self.present = torch.tensor(list(present), dtype=torch.int32, device=device)


class TensorSet:
    """A list of tensors with all their rows, ready for one launch.

    All tensors of one row share a dtype; all rows of one tensor share its shape and its order in
    memory.

    Args:
        rows: Name of a row to its tensors, in one order. ``param`` is required; ``weight``
            defaults to it.
        tiling: How to cut; the device's default when None.
        kept: How FP32 weights of 16-bit parameters are kept: ``SPLIT`` (with a row ``remainder``,
            BF16 only) or ``NONE``; None where they have a row of their own, or are the parameters.
        groups: For each tensor, the index of its parameter group; 0 when None.
        rule: What updates these tensors; only `step` and `predict` need it.

    Raises:
        ValueError: Unknown row, wrong count, shape, layout, dtype or device.
    """

    place: slice
    """Which rows of the per-tensor tables in `Scalars` are theirs."""
    first_column: int
    """Which columns of its first-stage sums are: those from here on, one for each program."""
    whole: Any = None  # what orthogonalises matrices of which other processes hold parts
    share = 1.0
    """What its sums count, in sums over several processes: 1 over how many hold the same."""
    stamp: object = None
    """Another one where more than addresses has changed: dtypes, or who has a gradient."""

    def __init__(
        self,
        rows: Mapping[str, Sequence[Tensor]],
        tiling: Tiling | None = None,
        kept: int | None = None,
        groups: Sequence[int] | None = None,
        rule: UpdateRule | None = None,
    ) -> None:
        params = list(rows["param"])
        if not params:
            raise ValueError("rows['param'] is empty: at least one tensor is needed")
        count = len(params)
        self.shapes = params
        self.device = device = params[0].device
        self.kept = OWN if kept is None else kept
        self.rule = rule
        self.matrices: MatrixSet | None = None  # to be orthogonalised, where the rule does so
        wide = 4 if self.kept != OWN else (rows.get("weight") or params)[0].element_size()
        self.tiling = tiling or default_tiling(device, wide)
        self.lengths = [p.numel() for p in params]
        self._nothing = [torch.empty(0, dtype=params[0].dtype, device=device)] * count
        self.flat: dict[str, Sequence[Tensor]] = {}  # dense 1-D views of the tensors of each row
        self.dtype: dict[str, torch.dtype] = {} if self.kept == OWN else {"weight": torch.float32}
        self.present = [True] * count  # whether each tensor has a gradient
        self.group = torch.tensor(groups or [0] * count, dtype=torch.int32, device=device)
        # Applied base updates of each tensor.
        self.steps = torch.zeros(count, dtype=torch.float32, device=device)
        self.rate_factors: Tensor | None = None
        """FP64, what the group's learning rate is multiplied with for each tensor; None for 1.
        (Reading a table of ones spilled registers on gfx942.)"""
        self.short: tuple[Any, ...] | None = None  # tables of `fingerprint_torch`
        self.together: dict[Any, Any] = {}  # those of `together_torch`
        self._addresses = AddressTable(self.lengths, device)
        self.tables = self._addresses.tables
        self._alike: Callable[..., bool] | None = None  # gradients that need no second look
        self._chunks: OrderedDict[tuple[bool, ...], ChunkTable] = OrderedDict()
        self._in_use: dict[bool, ChunkTable] = {}  # of every tensor, of those with a gradient
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        for name, tensors in rows.items():
            self.set_row(name, list(tensors))
        if "weight" not in rows and self.kept == OWN:
            self.set_row("weight", params)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_row(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Gives every tensor its memory for one row; None leaves a tensor out of launches.

        A gradient in another memory order than its parameter is copied into that order.
        """
        if name not in ROW:
            raise ValueError(f"row {name!r}: must be one of {sorted(ROW)}")
        if len(tensors) != len(self):
            raise ValueError(f"row {name!r} has {len(tensors)} tensors: must be {len(self)}")
        dtype = next((tensor.dtype for tensor in tensors if tensor is not None), None)
        flat: list[Tensor] = []
        for index, (tensor, like) in enumerate(zip(tensors, self.shapes)):
            try:
                flat.append(_fitting(name, tensor, like, dtype))
            except ValueError as error:
                raise ValueError(f"row {name!r}, tensor {index}: {error}") from None
        if dtype is not None:
            self._set_dtype(name, dtype)
        self.flat[name] = flat
        places = [*map(Tensor.data_ptr, flat)]
        self._addresses.put(ROW[name], places)
        if name == "grad":
            present = [tensor is not None for tensor in tensors]
            if present != self.present:
                self.present, self.stamp = present, object()
                self._in_use.pop(False, None)
            here = [tensor for tensor in tensors if tensor is not None]
            read_in_place = len(here) == len(self) and places == [*map(Tensor.data_ptr, here)]
            self._alike = likeness(here) if read_in_place else None

    def take_gradients(self, grads: Sequence[Tensor | None]) -> bool:
        """Sets the row of gradients, if these are like the last ones in all but their addresses.

        That is what mostly happens, and costs a small part of `set_row`.
        """
        try:
            if self._alike is None or not self._alike(*grads):
                return False
        except RuntimeError:  # a sparse one was asked for strides
            return False
        here = cast("Sequence[Tensor]", grads)
        self.flat["grad"] = DenseViews(here)
        self._addresses.put(ROW["grad"], [*map(Tensor.data_ptr, here)])
        return True

    def places_of(self, name: str) -> list[int]:
        """Where the tensors of a row lie; 0 where there is none."""
        return self._addresses.places[ROW[name]]

    def _set_dtype(self, name: str, dtype: torch.dtype) -> None:
        """Kernels read weight and state with one dtype; another would be read as garbage."""
        known = {**self.dtype, name: dtype}
        weight = known.get("weight")
        states = [row for row in known if weight and row != "weight" and row not in OWN_DTYPE]
        for row in states:
            if weight not in (torch.float32, torch.float64):
                raise ValueError(
                    f"row 'weight': dtype {weight}, must be torch.float32 or torch.float64 where "
                    f"there is a row {row!r}: a 16-bit parameter needs a master"
                )
            if known[row] != weight:
                raise ValueError(f"row {row!r}: dtype {known[row]}, must be {weight} as 'weight'")
        if known != self.dtype:
            self.dtype, self.stamp = known, object()

    def announce(self, name: str, dtype: torch.dtype) -> None:
        """Says that the tensors have a row whose memory comes by a later `set_row`."""
        self._set_dtype(name, dtype)
        self.release(name)

    def release(self, name: str) -> None:
        """Lets go of a row's memory until the next `set_row`; its addresses stay known."""
        self.flat[name] = self._nothing

    def chunks(self, every: bool = False) -> ChunkTable:
        """The chunk table of the tensors with a gradient, or of every tensor."""
        if every not in self._in_use:
            key = (True,) * len(self) if every else tuple(self.present)
            if key not in self._chunks:
                refuse_capture(self.device, NEVER_RUN)
                self._chunks[key] = ChunkTable(self.lengths, key, self.tiling.chunk, self.device)
                # A model whose unused parameters differ from step to step must not grow a table
                # for each pattern.
                if len(self._chunks) > 8:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end(key)
            self._in_use[every] = self._chunks[key]
        return self._in_use[every]

    def has_gradient(self) -> Tensor:
        """Which tensors have a gradient, bool ``[tensors]``."""
        if self.device.type == "cpu":  # whose plain torch needs no table
            return torch.tensor(self.present, device="cpu")
        return self.chunks().present != 0

    def room_for(self, columns: int) -> Tensor:
        """Scratch for the chunk sums of a kernel: FP32 ``[chunks · columns]``."""
        needed = self.chunks(every=True).count * columns
        if self._partials.numel() < needed:
            self._partials = torch.empty(needed, dtype=torch.float32, device=self.device)
        return self._partials[:needed]

    def prepared(
        self,
        kernel: Any,
        *arguments: Any,
        every: bool = False,
        options: Mapping[str, object] = LAUNCH,
        **constants: Any,
    ) -> Launch:
        """A launch over the chunks of the tensors with a gradient, or of every tensor.

        The kernel takes ``addresses, extents, places, n_chunks`` first, and among its compile-time
        constants those by which it finds the weights. It holds as long as the `stamp` does.
        """
        addresses, extents = self.tables()
        chunks = self.chunks(every)
        tiling = self.tiling
        return prepared(
            kernel, (tiling.programs,),
            addresses, extents, chunks.places, chunks.count, *arguments, **constants,
            PARAM_TYPE=self.dtype_of("param"), STATE=self.dtype_of("weight"), KEPT=self.kept,
            BLOCK=tiling.block, CHUNK=tiling.chunk, **options,
        )  # fmt: skip

    def launch(self, kernel: Any, *arguments: Any, **keywords: Any) -> None:
        """Launches what `prepared` prepares."""
        start([self.prepared(kernel, *arguments, **keywords)], self.device)

    def torch_blocks(self, index: int, block: int = TORCH_BLOCK) -> Iterator[slice]:
        """Slices of one tensor for plain torch, small enough to stay in cache."""
        for begin in range(0, self.lengths[index], block):
            yield slice(begin, min(begin + block, self.lengths[index]))

    def block_rows(
        self, index: int, part: slice = slice(None), names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """A block of some rows, by default of all state that is here, for plain torch."""
        others, length = ("param", "weight", "grad", "remainder"), self.lengths[index]
        found = {name: self.flat[name][index] for name in names or self.flat.keys() - others}
        return {name: flat[part] for name, flat in found.items() if flat.numel() == length}

    def weight(self, index: int, part: slice) -> Tensor:
        """Weights of one tensor for plain torch, in the dtype of the mathematics.

        To be changed in place and handed to `put_weight`: where they are kept otherwise, this is
        a copy. What somebody else wrote into a parameter goes to its master (see `load_weight`).
        """
        param = self.flat["param"][index][part]
        if self.kept == OWN:
            weight = self.flat["weight"][index][part]
            if self.has_master:
                kept = weight.to(param.dtype) == param
                if kept.device.type != "cpu" or not bool(kept.all()):
                    weight.copy_(torch.where(kept, weight, param.to(weight.dtype)))
            return weight
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
        """The Triton dtype of a row; FP32 where the row is absent and so never read."""
        return TRITON_DTYPES[self.dtype.get(name, torch.float32)]

    def has(self, name: str) -> bool:
        """Whether the tensors have memory for a row."""
        return name in self.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the mathematics is done in: FP32, or FP64 for FP64 parameters."""
        return torch.float64 if self.dtype["weight"] == torch.float64 else torch.float32

    @property
    def factors(self) -> Tensor:
        """``rate_factors``, or what stands in for it where no kernel reads it."""
        return self.steps if self.rate_factors is None else self.rate_factors

    @property
    def frozen(self) -> bool:
        """Whether predictions along the rule leave these weights where they are."""
        return self.rule is not None and self.rule.along is None

    @property
    def has_master(self) -> bool:
        """Whether a weight of its own stands behind every parameter."""
        return self.dtype["weight"] != self.dtype["param"]


def _fitting(name: str, tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The dense view of one tensor of a row, if kernels can read it beside the others."""
    if tensor is None:
        if name != "grad":
            raise ValueError("None, allowed only for 'grad'; every other row needs a tensor")
        return like.new_empty(0)
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"shape {tuple(tensor.shape)} on {tensor.device}, "
            f"must be {tuple(like.shape)} on {like.device}"
        )
    known = dtype in TRITON_DTYPES or (name in OWN_DTYPE and dtype in (torch.int8, torch.int16))
    if tensor.dtype != dtype or not known:
        raise ValueError(
            f"dtype {tensor.dtype}, must be {dtype} as the first of the row and one of "
            f"{list(TRITON_DTYPES)}"
        )
    if name != "param" and not same_layout(tensor, like):
        if name != "grad":
            raise ValueError(
                f"strides {tensor.stride()}, must be those of its parameter, {like.stride()}"
            )
        tensor = torch.empty_like(like, dtype=dtype).copy_(tensor)
    return dense_view(tensor.detach())


@triton.jit
def chunk_at(chunk, places, extents, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Tensor and first element of a chunk, the tensor's length, and whether the chunk is full.

    A full chunk has all its elements and an aligned tensor: it takes a branch without masks.
    """
    tensor = tl.load(places + 2 * chunk).to(tl.int32)
    start = tl.multiple_of(tl.load(places + 2 * chunk + 1), BLOCK)
    extent = tl.load(extents + tensor)
    length = extent >> 1
    return tensor, start, length, (start + CHUNK <= length) & ((extent & 1) != 0)


@triton.jit
def chunk_length(start, length, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """Elements of a chunk that begins at ``start`` of a tensor."""
    return CHUNK if FULL else tl.minimum(length - start, CHUNK).to(tl.int32)


def assembled(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 masters of BF16 parameters from what is missing in them (see `store_weight`)."""
    high, low = param.view(torch.int16).to(torch.int32), remainder.to(torch.int32)
    low = torch.where((high & 0x7FFF) == 0, low.clamp(min=0), low)
    low = torch.where((high & 0x7FFF) == 0x7F80, low.clamp(max=0), low)
    return ((high << 16) + low).view(torch.float32)


def remainder_of(weight: Tensor, param: Tensor) -> Tensor:
    """What BF16 parameters lack of their FP32 masters; int16."""
    high = param.view(torch.int16).to(torch.int32) << 16
    return (weight.view(torch.int32) - high).clamp(max=32767).to(torch.int16)
