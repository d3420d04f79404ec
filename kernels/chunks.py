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
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HISTORY = 8
"""Most trajectory points that the tables have rows for."""

ROWS: tuple[str, ...] = (
    "param",
    "grad",
    "weight",
    "exp_avg",
    "exp_avg_sq",
    "slow_ema",
    "snapshot",
    *(f"history_{i}" for i in range(MAX_HISTORY)),
)
"""The roles a tensor can have in a launch. ``weight`` is what the mathematics moves: the
FP32 master of a 16-bit parameter, otherwise the parameter itself."""

ROW = {name: index for index, name in enumerate(ROWS)}

N_ROWS = tl.constexpr(len(ROWS))
PARAM = tl.constexpr(ROW["param"])
GRAD = tl.constexpr(ROW["grad"])
WEIGHT = tl.constexpr(ROW["weight"])
EXP_AVG = tl.constexpr(ROW["exp_avg"])
EXP_AVG_SQ = tl.constexpr(ROW["exp_avg_sq"])
SLOW_EMA = tl.constexpr(ROW["slow_ema"])
SNAPSHOT = tl.constexpr(ROW["snapshot"])
HISTORY = tl.constexpr(ROW["history_0"])

NUM_WARPS = 4
"""Warps of a program."""

REGISTERS = 128
"""Most registers a thread may use: four programs fill the 65,536 of a multiprocessor."""

TAIL_SHARE = tl.constexpr(4)
"""A chunk with an end in it, or without alignment, is worked on in blocks smaller by this:
masks and narrow accesses cost registers, and short tensors need few of the small blocks."""

MAX_PROGRAMS = 1024
"""Upper limit of programs in a launch, and so of first-stage partial sums."""

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""Floating-point dtypes that the kernels read and write."""

# Elements that plain torch works on at a time: a block (2 MiB in FP32) stays in cache, so an
# update of many operations still reads and writes main memory about once. Measured on 2
# cores, AdamW with slow EMA on 124M parameters: 2^16 0.159 s, 2^17 0.151, 2^19 0.144.
REFERENCE_BLOCK = 1 << 19


@dataclass(frozen=True)
class Tiling:
    """How a tensor is cut.

    Attributes:
        block: Elements a program holds in registers at a time; a power of two.
        chunk: Elements of one table entry; a multiple of ``block``.
        programs: Programs of a launch.
    """

    block: int
    chunk: int
    programs: int

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block}: must be a power of two of at least 16")
        if self.chunk < self.block or self.chunk % self.block:
            raise ValueError(f"chunk={self.chunk}: must be a multiple of block={self.block}")
        if not 1 <= self.programs <= MAX_PROGRAMS:
            raise ValueError(f"programs={self.programs}: must be in [1, {MAX_PROGRAMS}]")


def gpu_tiling(processors: int, warp_size: int = 32, itemsize: int = 4) -> Tiling:
    """The tiling for a GPU.

    A block is two 128-bit accesses of each thread to a row of the weights' width (or one to
    a row of half that width); the blocks of a chunk share its table look-ups; 4 programs on
    each multiprocessor are certain to be resident together at up to ``REGISTERS`` registers
    a thread, which the grid barrier of a cooperative launch needs.

    Args:
        processors: Multiprocessors of the device.
        warp_size: Threads of a warp.
        itemsize: Bytes of a weight.
    """
    block = 32 // itemsize * NUM_WARPS * warp_size
    return Tiling(block, 8192, min(4 * processors, MAX_PROGRAMS))


def default_tiling(device: torch.device, itemsize: int = 4) -> Tiling:
    """The tiling for a device and weights of ``itemsize`` bytes.

    On the CPU (the interpreter) one program takes large blocks, because there a block costs
    the same whatever its size.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        warp_size = getattr(properties, "warp_size", 32)
        return gpu_tiling(properties.multi_processor_count, warp_size, itemsize)
    return Tiling(1 << 16, 1 << 16, 1)


@triton.jit
def _probe(pointer):
    tl.store(pointer, 1)


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"
"""Whether Triton runs kernels by its interpreter (``TRITON_INTERPRET=1`` at import)."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def row_pointer(addresses, row, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The base pointer of one role of one tensor."""
    pointer = tl.load(addresses + tensor * N_ROWS + row).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """Rounds to the nearest number of a dtype, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter truncates, and loses the sign of zero. The compiler never sees this.
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(values == values, nearest, 0x7FC0)
        narrowed = nearest.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        narrowed = values.to(DTYPE)
    return narrowed


@triton.jit
def remaining(start, length, CHUNK: tl.constexpr):
    """Elements of a tensor in the chunk that begins at ``start``."""
    return tl.minimum(length - start, CHUNK).to(tl.int32)


@triton.jit
def _eights(BLOCK: tl.constexpr):
    """Offsets of a block in rows of 8: what a thread moves of a 16-bit role at a time."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def load_row(
    addresses,
    row,
    tensor,
    begin,
    length,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    OTHER: tl.constexpr = 0.0,
):
    """A block of one role, promoted to ``COMPUTE``; ``OTHER`` beyond the end of the tensor.

    A full chunk takes the branch without a mask: with one, ptxas emits 32-bit loads. There a
    16-bit role is read as a matrix, which Triton gives a layout of its own: 8 elements a
    thread are one 128-bit access, where an FP32 role takes 4. In one layout for both, every
    FP32 row would go through shared memory on its way back.
    """
    pointer = row_pointer(addresses, row, tensor, DTYPE, FULL)
    if FULL:
        if DTYPE == COMPUTE:
            values = tl.load(pointer + (begin + tl.arange(0, BLOCK)))
        else:
            values = tl.reshape(tl.load(pointer + (begin + _eights(BLOCK))), (BLOCK,))
    else:
        offsets = begin + tl.arange(0, BLOCK)
        values = tl.load(pointer + offsets, mask=offsets < length, other=OTHER)
    return values.to(COMPUTE)


@triton.jit
def store_row(
    addresses,
    row,
    tensor,
    begin,
    length,
    values,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Writes a block of one role, rounded once to the role's dtype."""
    pointer = row_pointer(addresses, row, tensor, DTYPE, FULL)
    values = narrow(values, DTYPE)
    if FULL:
        if DTYPE == COMPUTE:
            tl.store(pointer + (begin + tl.arange(0, BLOCK)), values)
        else:
            tl.store(pointer + (begin + _eights(BLOCK)), tl.reshape(values, (BLOCK // 8, 8)))
    else:
        offsets = begin + tl.arange(0, BLOCK)
        tl.store(pointer + offsets, values, mask=offsets < length)


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

    Raises:
        ValueError: Unknown role, wrong count, shape, layout, dtype or device.
    """

    def __init__(self, rows: Mapping[str, Sequence[Tensor]], tiling: Tiling | None = None) -> None:
        params = list(rows["param"])
        if not params:
            raise ValueError("rows['param'] is empty: at least one tensor is needed")
        self.shapes = params
        self.device = params[0].device
        weights = rows.get("weight") or params
        self.tiling = tiling or default_tiling(self.device, weights[0].element_size())
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
        for name, tensors in rows.items():
            self.set_row(name, list(tensors))
        if "weight" not in rows:
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
            if tensor.dtype != dtype or dtype not in TRITON_DTYPES:
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
            if weight is None or row in ("param", "grad", "weight"):
                continue
            if weight not in (torch.float32, torch.float64):
                raise ValueError(
                    f"row 'weight': dtype {weight}, must be torch.float32 or torch.float64 where "
                    f"there is a row {row!r}: a 16-bit parameter needs a master"
                )
            if state != weight:
                raise ValueError(f"row {row!r}: dtype {state}, must be {weight} as 'weight'")

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

    def dtype_of(self, name: str) -> tl.dtype:
        """The Triton dtype of a role; FP32 where the role is absent and so never read."""
        return TRITON_DTYPES[self.dtype.get(name, torch.float32)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the mathematics is done in: FP32, or FP64 for FP64 parameters."""
        return torch.float64 if self.dtype["weight"] == torch.float64 else torch.float32

    @property
    def has_master(self) -> bool:
        """Whether a weight of its own stands behind every parameter."""
        return self.dtype["weight"] != self.dtype["param"]


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to the device without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    # A fresh pinned buffer each time: its allocator does not hand it out again before the
    # copy has run, so no earlier copy is overwritten in flight.
    return host.pin_memory().to(device, non_blocking=True)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device current for a launch; does nothing elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch_options(backend: str, resident: bool = False) -> dict[str, object]:
    """Launch options of the kernels.

    FP fusion is off so that compiled code, interpreter and reference round alike; the kernels
    wait for memory, so it costs nothing. Registers are limited: on NVIDIA by number, on AMD
    by how many waves must share the 512 of a unit, 4 being what ``REGISTERS`` allows.

    Args:
        backend: "cuda", "hip" or "interpreter".
        resident: Whether all programs of the launch must be resident together. A compiler
            may take more than ``REGISTERS`` without it, and a cooperative launch would then
            be refused.
    """
    options: dict[str, object] = {
        "num_warps": NUM_WARPS,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    if backend == "cuda":
        options["maxnreg"] = REGISTERS
    elif backend == "hip":
        options["waves_per_eu"] = 4 if resident else 3
    return options


_BACKEND = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"

LAUNCH = launch_options(_BACKEND)
"""Launch options of every kernel but one, on this machine."""

RESIDENT_LAUNCH = launch_options(_BACKEND, resident=True)
"""Launch options of the kernel with a grid barrier, on this machine."""


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
