"""Compiles every kernel for every target, without a GPU, and looks at what came out.

    python -m triton_hybrid.kernels.audit [--target sm_90] [--kernel adamw] [--json FILE]

Nothing here repeats how a kernel is launched: the launchers themselves are called on small
CPU tensors, their launches are recorded instead of run, and what was recorded is compiled.
So a kernel is audited with the arguments, the specialisation and the options it really has.

For each launch and target the table shows registers, spills, shared memory, the widest
global access and the bytes moved for each element of a full chunk. The bytes are counted
twice: from the roles that the kernel reads and writes (this file's ``cases``), and from the
128-bit accesses in the assembly. The two must agree: an access that lost its alignment, or
that nobody knows of, breaks the equation.

Exits with 1 on a failed compile, a spill, a full chunk with an access narrower than 128
bits, more bytes than the table knows, or a cooperative launch whose programs cannot all be
resident together; with 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction
from triton_hybrid.kernels.adamw import HYPER_FIELDS, Workspace, adamw_step
from triton_hybrid.kernels.chunks import (
    INTERPRETED,
    LAUNCH,
    MAX_HISTORY,
    REGISTERS,
    RESIDENT_LAUNCH,
    TensorSet,
    gpu_tiling,
    launch_options,
)
from triton_hybrid.kernels.correct import SLOPE_SUMS, correct, slopes
from triton_hybrid.kernels.divergence import MEMORY_COLUMNS, judge
from triton_hybrid.kernels.gram import gram, reduce_partials
from triton_hybrid.kernels.ledger import new_ledger
from triton_hybrid.kernels.predict import MOVE_COLUMNS, predict, settle

REGISTER_LIMIT = REGISTERS
"""Most registers a thread of a cooperative launch may use."""

SHARED_LIMIT = 16 * 1024
"""Most shared memory, in bytes, of a program of a cooperative launch: four fit everywhere."""

WIDE = 128
"""Bits that an access in a full chunk must have."""

MOST_UNROLLED = 64
"""How often a compiler may repeat the body of a block loop."""

COOPERATIVE = "launch_cooperative_grid"


# --------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        name: As on the command line.
        arch: What Triton calls it.
        processors: Multiprocessors of a typical device, which set the number of programs.
        oldest_triton: First version that compiles for it with nothing else installed.
    """

    name: str
    arch: int | str
    processors: int
    oldest_triton: tuple[int, int] = (3, 2)

    @property
    def backend(self) -> str:
        """``cuda`` or ``hip``."""
        return "cuda" if isinstance(self.arch, int) else "hip"

    @property
    def warp_size(self) -> int:
        """Threads of a warp."""
        return 32 if self.backend == "cuda" else 64

    def gpu(self) -> GPUTarget:
        """The target as Triton takes it."""
        return GPUTarget(self.backend, self.arch, self.warp_size)

    @functools.cached_property
    def options(self) -> frozenset[str]:
        """Names of the launch options that this Triton has for the target."""
        options = launch_options(self.backend)
        return frozenset(vars(make_backend(self.gpu()).parse_options(options)))


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 80, 108),
        Target("sm_90", 90, 132),
        Target("sm_100", 100, 148, (3, 3)),
        Target("sm_120", 120, 170, (3, 3)),
        Target("gfx942", "gfx942", 304, (3, 3)),
    )
}


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


# ------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Launch:
    """One launch, as a launcher asked for it.

    Attributes:
        kernel: The ``@triton.jit`` function.
        arguments: Its arguments, compile-time constants among them.
        options: Launch options.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def cooperative(self) -> bool:
        """Whether all programs must be resident together."""
        return bool(self.options.get(COOPERATIVE, False))


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Collects launches instead of running them, with the options that the target gets."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args))
        arguments.update((k, v) for k, v in kwargs.items() if k in names)
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(kernel, arguments, options))

    with (
        mock.patch.dict(LAUNCH, launch_options(target.backend), clear=True),
        mock.patch.dict(RESIDENT_LAUNCH, launch_options(target.backend, True), clear=True),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield launches


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


def source_of(launch: Launch) -> ASTSource:
    """What Triton's launcher would hand to its compiler, specialised as it would."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[int] = []
    ones: list[int] = []
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name] = "constexpr"
            constants[name] = value
            ones.append(index)
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                divisible.append(index)
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
        return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    # Triton 3.2.
    from triton.backends.compiler import AttrsDescriptor

    for index in ones:
        signature[launch.kernel.arg_names[index]] = "i32"
    types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    hints = dict.fromkeys(divisible, 16) | dict.fromkeys(ones, 1)
    return ASTSource(launch.kernel, types, constants, AttrsDescriptor.from_hints(hints))


# ---------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A launch to audit, and what it is known to move.

    The byte counts are those of one element in a full chunk, one entry a role.

    Attributes:
        name: As in the table.
        kernel: Which kernel, as on the command line.
        launch: Makes the launch for a target.
        reads: Item sizes of the roles that a block reads.
        writes: Item sizes of the roles that a block writes.
        first_pass: Item sizes of the roles that a pass of its own reads before.
        untaken: Bytes among ``reads`` in branches of which one is not taken.
        floor: Bytes that the bare operation has to move; None where elements are not moved.
        may_spill: Whether spills are shown only. True for FP64, which nobody trains with: it
            has to run, not to be fast.
    """

    name: str
    kernel: str
    launch: Callable[[Target], Launch]
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    first_pass: tuple[int, ...] = ()
    untaken: int = 0
    floor: int | None = None
    may_spill: bool = False

    @property
    def bytes_per_element(self) -> int | None:
        """Bytes that the kernel moves for an element; None where it moves none."""
        total = sum(self.reads) + sum(self.writes) + sum(self.first_pass) - self.untaken
        return total or None


@dataclass(frozen=True)
class Precision:
    """Dtypes of a model.

    Attributes:
        param: What the model computes with; gradients have it too.
        weight: What the optimizer computes with, the dtype of all state.
    """

    param: torch.dtype
    weight: torch.dtype

    @property
    def name(self) -> str:
        """Short name, as in the table."""
        return _TYPES[self.param]

    @property
    def master(self) -> tuple[int, ...]:
        """Item size of the parameter where a master stands behind it."""
        return (self.param.itemsize,) if self.param != self.weight else ()


FP32 = Precision(torch.float32, torch.float32)
FP64 = Precision(torch.float64, torch.float64)
HALVES = (Precision(torch.float16, torch.float32), Precision(torch.bfloat16, torch.float32))

# Three tensors of several chunks: no argument is 1 or a multiple of 16 by accident, and so
# none is specialised. One tensor of one chunk is the opposite: everything is.
_MANY = (30_000, 20_000, 10_000)
_SINGLE = (8_192,)


class _Problem:
    """The tensors of a launch: small, on the CPU, never touched by a kernel."""

    def __init__(self, target: Target, precision: Precision, lengths: Sequence[int]) -> None:
        state = precision.weight
        rows: dict[str, list[Tensor]] = {"param": self._row(lengths, precision.param)}
        rows["grad"] = self._row(lengths, precision.param)
        if precision.master:
            rows["weight"] = self._row(lengths, state)
        history = [f"history_{index}" for index in range(MAX_HISTORY)]
        for name in ("exp_avg", "exp_avg_sq", "slow_ema", "snapshot", *history):
            rows[name] = self._row(lengths, state)
        self.tiling = gpu_tiling(target.processors, target.warp_size, state.itemsize)
        self.tensors = TensorSet(rows, self.tiling)
        count = len(lengths)
        self.group = torch.zeros(count, dtype=torch.int32)
        self.steps = torch.zeros(count)
        self.hyper = torch.zeros(1, len(HYPER_FIELDS), dtype=torch.float64)
        self.memory = torch.zeros(count, MEMORY_COLUMNS.value)
        self.ledger = new_ledger(torch.device("cpu"))
        self.coefficients = torch.zeros(count, MAX_HISTORY)
        self.arrivals = torch.zeros(2, dtype=torch.int32)

    @staticmethod
    def _row(lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(length, dtype=dtype) for length in lengths]

    def scratch(self, columns: int) -> tuple[Tensor, Tensor]:
        """Chunk partials and tensor sums of so many columns."""
        chunks = self.tensors.chunks(every=True)
        sums = torch.zeros(len(self.tensors), columns, dtype=torch.float64)
        return torch.zeros(chunks.count, columns), sums


def _adamw(
    target: Target,
    precision: Precision,
    lengths: Sequence[int],
    part: str,
    clip: bool,
    slow: bool,
    measured: bool,
) -> Launch:
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        adamw_step(
            [problem.tensors],
            [problem.group],
            [problem.steps],
            problem.hyper,
            problem.ledger,
            Workspace([problem.tensors]),
            max_norm=1.0 if clip else None,
            slow_beta=0.9 if slow else 0.0,
            observed=True,
            measured=measured,
            cooperative=part == "one launch",
        )
    return launches[-1 if part == "update" else 0]


def _predict(
    target: Target, precision: Precision, lengths: Sequence[int], trajectory: bool
) -> Launch:
    problem = _Problem(target, precision, lengths)
    partials, sums = problem.scratch(MOVE_COLUMNS)
    with recorded(target) as launches:
        predict(
            problem.tensors,
            problem.group,
            problem.steps,
            problem.hyper,
            problem.coefficients if trajectory else None,
            problem.memory,
            problem.ledger,
            partials,
            sums,
            threshold=0.5,
            share=0.5,
            save=True,
        )
    return launches[0]


def _settle(target: Target, precision: Precision, lengths: Sequence[int]) -> Launch:
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        settle(
            problem.tensors,
            problem.scratch(MOVE_COLUMNS)[1],
            problem.memory,
            problem.ledger,
            problem.arrivals,
            threshold=0.5,
            limit=10.0,
            cooldown=5.0,
            last=True,
        )
    return launches[0]


def _gram(target: Target, precision: Precision, lengths: Sequence[int], slot: int) -> Launch:
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        gram(problem.tensors, MAX_HISTORY, slot, *problem.scratch(MAX_HISTORY))
    return launches[0]


def _reduce(target: Target) -> Launch:
    problem = _Problem(target, FP32, _MANY)
    partials, sums = problem.scratch(MOVE_COLUMNS)
    with recorded(target) as launches:
        reduce_partials(partials, problem.tensors.chunks(every=True), sums)
    return launches[0]


def _slopes(target: Target, precision: Precision, lengths: Sequence[int]) -> Launch:
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        slopes(problem.tensors, problem.group, problem.hyper, *problem.scratch(SLOPE_SUMS))
    return launches[0]


def _correct(target: Target, precision: Precision, lengths: Sequence[int], restart: bool) -> Launch:
    problem = _Problem(target, precision, lengths)
    with recorded(target) as launches:
        correct(problem.tensors, problem.memory, problem.ledger, restart=restart)
    return launches[0]


def _judge(target: Target, lengths: Sequence[int]) -> Launch:
    problem = _Problem(target, FP32, lengths)
    with recorded(target) as launches:
        judge(problem.ledger, problem.scratch(SLOPE_SUMS)[1], problem.memory, 2.5, 5.0)
    return launches[0]


def _adamw_case(
    precision: Precision,
    part: str = "one launch",
    *,
    clip: bool = False,
    slow: bool = False,
    measured: bool = True,
    lengths: Sequence[int] = _MANY,
) -> Case:
    wide, narrow = precision.weight.itemsize, precision.param.itemsize
    words = [precision.name, part]
    words += ["clip"] * clip + ["slow EMA"] * slow + ["unmeasured"] * (slow and not measured)
    words += ["one chunk"] * (lengths is _SINGLE)
    # weight, exp_avg, exp_avg_sq; the gradient; the slow EMA
    extra = (wide,) * slow
    reads, writes = (wide,) * 3 + (narrow,) + extra, (wide,) * 3 + precision.master + extra
    floor = 6 * wide + narrow + sum(precision.master)
    launch = functools.partial(
        _adamw,
        precision=precision,
        lengths=lengths,
        part=part,
        clip=clip,
        slow=slow,
        measured=measured,
    )
    name = "adamw " + ", ".join(words)
    if part == "statistics":
        return Case(name, "adamw", launch, reads=(narrow,), floor=narrow)
    first = (narrow,) if part == "one launch" else ()
    return Case(
        name,
        "adamw",
        launch,
        reads,
        writes,
        first_pass=first,
        floor=floor,
        may_spill=precision == FP64,
    )


def _move_cases(precision: Precision, lengths: Sequence[int] = _MANY) -> list[Case]:
    """Predict, settle, slopes, correct."""
    wide, narrow, master = precision.weight.itemsize, precision.param.itemsize, precision.master
    common: dict[str, Any] = {"precision": precision, "lengths": lengths}
    name = precision.name + (", one chunk" if lengths is _SINGLE else "")
    move = (wide, *master)
    basis = (wide,) * MAX_HISTORY
    return [
        # Reads weight, exp_avg, exp_avg_sq and slow_ema; the bare move needs no exp_avg and
        # keeps no snapshot.
        Case(
            f"predict {name}, slow EMA",
            "predict",
            functools.partial(_predict, trajectory=False, **common),
            (wide,) * 4,
            (wide, *move),
            floor=3 * wide + sum(move),
        ),
        Case(
            f"predict {name}, trajectory of {MAX_HISTORY}",
            "predict",
            functools.partial(_predict, trajectory=True, **common),
            (wide, wide, *basis),
            (wide, *move),
            floor=wide + sum(basis) + sum(move),
        ),
        Case(
            f"settle {name} (when it takes back)",
            "settle",
            functools.partial(_settle, **common),
            (wide,),
            move,
            floor=wide + sum(move),
        ),
        Case(
            f"slopes {name}",
            "slopes",
            functools.partial(_slopes, **common),
            (narrow, wide, wide),
            floor=narrow + 2 * wide,
        ),
        Case(
            f"correct {name}, restart",
            "correct",
            functools.partial(_correct, restart=True, **common),
            (wide, wide),
            (wide, *move),
            floor=2 * wide + sum(move),
        ),
    ]


def _gram_case(slot: int, lengths: Sequence[int] = _MANY) -> Case:
    # The load of each row lies in a branch, but for the row known to be written; of a row
    # that is only known at run time, one branch is not taken.
    wide = FP32.weight.itemsize
    known = slot == 1
    rows = 2 + MAX_HISTORY - known
    moved = (2 + MAX_HISTORY - 1 + 2) * wide
    return Case(
        f"gram fp32, history of {MAX_HISTORY}" + (", one chunk" if lengths is _SINGLE else ""),
        "gram",
        functools.partial(_gram, precision=FP32, lengths=lengths, slot=slot),
        (wide,) * rows,
        (wide, wide),
        untaken=0 if known else wide,
        floor=moved,
    )


def cases() -> list[Case]:
    """Every launch to audit."""
    found: list[Case] = []
    for precision in (FP32, *HALVES):
        for clip in (True, False):
            found.append(_adamw_case(precision, clip=clip))
            found.append(_adamw_case(precision, clip=clip, slow=True))
        found.append(_adamw_case(precision, clip=True, slow=True, measured=False))
        found.append(_adamw_case(precision, "statistics"))
        found.append(_adamw_case(precision, "update", clip=True))
        found.append(_adamw_case(precision, "update", clip=True, slow=True))
    found.append(_adamw_case(FP32, clip=True, slow=True, lengths=_SINGLE))
    found.append(_adamw_case(FP64, clip=True, slow=True))
    for precision in (FP32, *HALVES):
        found.extend(_move_cases(precision))
    found.extend(_move_cases(FP32, _SINGLE))
    found.append(_gram_case(slot=2))
    found.append(_gram_case(slot=1, lengths=_SINGLE))
    found.append(Case("reduce", "reduce", _reduce))
    found.append(Case("judge", "judge", functools.partial(_judge, lengths=_MANY)))
    found.append(Case("judge, one tensor", "judge", functools.partial(_judge, lengths=_SINGLE)))
    return found


# ------------------------------------------------------------------------- assembly


@dataclass(frozen=True)
class Access:
    """A load from or a store to global memory.

    Attributes:
        store: Whether it is a store.
        bits: Bits that one thread moves.
        scratch: Whether it goes around the first-level cache: a look at the partial sums of
            other programs, not at a role of a tensor.
    """

    store: bool
    bits: int
    scratch: bool = False


_PTX = re.compile(r"(?<![\w.])(ld|st)((?:\.[\w:]+)+)\s")
_PTX_WORD = re.compile(r"(?:b|u|s|f|bf)(\d+)(?:x(\d))?$")


def ptx_accesses(ptx: str) -> list[Access]:
    """Global loads and stores of PTX code."""
    found = []
    for kind, tail in _PTX.findall(ptx):
        words = tail[1:].split(".")
        width = _PTX_WORD.match(words[-1])
        if "global" not in words or width is None:
            continue
        vector = [int(word[1:]) for word in words if re.fullmatch(r"v\d+", word)]
        bits = int(width[1]) * int(width[2] or 1) * (vector[0] if vector else 1)
        found.append(Access(kind == "st", bits, "cg" in words))
    return found


_LLVM_BITS = {"half": 16, "bfloat": 16, "i16": 16, "float": 32, "i32": 32, "double": 64, "i64": 64}
_LLVM_LOAD = re.compile(r"\bload (?:volatile )?<(\d+) x (\w+)>, ptr addrspace\(1\)(.*)")
_LLVM_STORE = re.compile(r"\bstore (?:volatile )?<(\d+) x (\w+)> .*, ptr addrspace\(1\)(.*)")
_LLVM_BUFFER = re.compile(
    r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.v(\d+)(\w+)\(.*?i32 (?:noundef )?(\d+)\)"
)
_SHORT_NAMES = {"f16": "half", "bf16": "bfloat", "f32": "float", "f64": "double"}


def llvm_accesses(llvm: str) -> list[Access]:
    """Global vector loads and stores of AMD's LLVM code.

    Assembly does not tell a row of a tensor from two neighbouring table entries, which its
    compiler loads at once; the vector types of the LLVM code do.
    """
    found = []
    for line in llvm.splitlines():
        for pattern, store in ((_LLVM_LOAD, False), (_LLVM_STORE, True)):
            match = pattern.search(line)
            if match and match[2] in _LLVM_BITS:
                bits = int(match[1]) * _LLVM_BITS[match[2]]
                found.append(Access(store, bits, "nontemporal" in match[3]))
        match = _LLVM_BUFFER.search(line)
        if match and not line.startswith("declare"):
            kind = _SHORT_NAMES.get(match[3], match[3])
            found.append(
                Access(match[1] == "store", int(match[2]) * _LLVM_BITS[kind], match[4] != "0")
            )
    return found


_GCN = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_GCN_BITS = {
    "b128": 128, "dwordx4": 128, "b96": 96, "dwordx3": 96, "b64": 64, "dwordx2": 64, "b32": 32,
    "dword": 32, "b16": 16, "short": 16, "ushort": 16, "sshort": 16, "short_d16": 16,
    "short_d16_hi": 16, "b8": 8, "byte": 8, "ubyte": 8, "sbyte": 8,
}  # fmt: skip


def gcn_accesses(assembly: str) -> list[Access]:
    """Global loads and stores of AMD assembly."""
    found = []
    for kind, width in _GCN.findall(assembly):
        if width in _GCN_BITS:
            found.append(Access(kind == "store", _GCN_BITS[width]))
    return found


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: Registers of a thread.
        spills: Bytes of stack of a thread (NVIDIA), or spilled registers (AMD).
    """

    registers: int
    spills: int


def nvidia_resources(cubin: bytes) -> Resources:
    """Resources of the kernel in a cubin, as ``cuobjdump`` reads them.

    Raises:
        RuntimeError: ``cuobjdump`` failed, or printed something else.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    if match is None:
        raise RuntimeError(f"{' '.join(command)} printed no resources: {run.stdout}{run.stderr}")
    return Resources(int(match[1]), int(match[2]))


def amd_resources(assembly: str) -> Resources:
    """Resources of the kernel in AMD assembly, from its metadata.

    Raises:
        RuntimeError: An entry is missing.
    """

    def entry(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"assembly has no entry .{name}")
        return int(match[1])

    spills = entry("vgpr_spill_count") + entry("sgpr_spill_count")
    return Resources(entry("vgpr_count"), spills + entry("private_segment_fixed_size"))


# ------------------------------------------------------------------------ the audit


@dataclass
class Finding:
    """What came out for one case and target.

    Attributes:
        case: Name of the case.
        kernel: Which kernel.
        target: Name of the target.
        cooperative: Whether all programs must be resident together.
        registers: Registers of a thread.
        spills: Bytes of stack (NVIDIA) or spilled registers (AMD) of a thread.
        shared_bytes: Shared memory of a program.
        widest_bits: Widest global access.
        bytes_per_element: Bytes moved for an element of a full chunk, by its accesses.
        known_bytes: The same by the roles it reads and writes.
        floor_bytes: What the bare operation has to move.
        seconds: Time to compile.
        skipped: Why nothing was compiled; empty otherwise.
        failures: What is wrong; empty when nothing is.
    """

    case: str
    kernel: str
    target: str
    cooperative: bool = False
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    widest_bits: int | None = None
    bytes_per_element: float | None = None
    known_bytes: int | None = None
    floor_bytes: int | None = None
    seconds: float = 0.0
    skipped: str = ""
    failures: list[str] = field(default_factory=list)


def moved_bytes(case: Case, accesses: Sequence[Access], elements: int) -> float:
    """Bytes that a full chunk's path moves for each element, from its wide accesses.

    Full chunks use accesses of 128 bits and more, and nothing else does, so those of a
    thread must sum up to the roles of the case, times the elements of a thread, times the
    copies of the loop body that the compiler made.

    Args:
        case: The case, with the item sizes of its roles.
        accesses: Global accesses of the compiled kernel.
        elements: Elements of a block that one thread works on.

    Raises:
        ValueError: They do not.
    """
    wide = [access for access in accesses if access.bits >= WIDE and not access.scratch]
    loaded = sum(access.bits for access in wide if not access.store) // 8
    stored = sum(access.bits for access in wide if access.store) // 8
    reads, writes = sum(case.reads) * elements, sum(case.writes) * elements
    first = sum(case.first_pass) * elements
    for copies in range(1, MOST_UNROLLED + 1):
        rest = loaded - copies * reads
        if stored != copies * writes or rest < 0:
            continue
        if first and rest and rest % first == 0 and rest // first <= MOST_UNROLLED:
            return (first + reads + writes) / elements - case.untaken
        if not first and rest == 0:
            return (reads + writes) / elements - case.untaken
    raise ValueError(
        "the 128-bit accesses of full chunks do not add up: a thread loads "
        f"{loaded} and stores {stored} bytes by them, its roles are {reads} and {writes} bytes a "
        f"block{f' after {first} in a pass before' if first else ''}; either an access is narrower "
        "than 128 bits, or the kernel moves what its case does not list"
    )


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compiles a launch for a target; returns Triton's compiled kernel.

    Raises:
        ValueError: A launch option that Triton would refuse at run time.
    """
    unknown = sorted(set(launch.options) - target.options)
    if unknown:
        raise ValueError(f"launch options {unknown} are unknown to the {target.backend} backend")
    return triton.compile(source_of(launch), target=target.gpu(), options=dict(launch.options))


def audit(case: Case, target: Target) -> Finding:
    """Compiles a case for a target and looks at what came out."""
    finding = Finding(case.name, case.kernel, target.name)
    finding.known_bytes, finding.floor_bytes = case.bytes_per_element, case.floor
    try:
        launch = case.launch(target)
        finding.cooperative = launch.cooperative
        if launch.cooperative and COOPERATIVE not in target.options:
            finding.skipped = "this Triton has no cooperative launches"
            return finding
        begin = time.perf_counter()
        compiled = compile_launch(launch, target)
        finding.seconds = time.perf_counter() - begin
        _inspect(case, target, launch, compiled, finding)
    except Exception as error:  # a compiler may raise anything; every case gets its line
        finding.failures.append(f"{type(error).__name__}: {error}")
    return finding


def _inspect(case: Case, target: Target, launch: Launch, compiled: Any, finding: Finding) -> None:
    if target.backend == "cuda":
        resources = nvidia_resources(compiled.asm["cubin"])
        accesses = emitted = ptx_accesses(compiled.asm["ptx"])
    else:
        resources = amd_resources(compiled.asm["amdgcn"])
        accesses = llvm_accesses(compiled.asm["llir"])
        emitted = gcn_accesses(compiled.asm["amdgcn"])
    finding.registers, finding.spills = resources.registers, resources.spills
    finding.shared_bytes = int(compiled.metadata.shared)
    finding.widest_bits = max((access.bits for access in emitted), default=0)
    failures = finding.failures
    if finding.spills and not case.may_spill:
        unit = "bytes" if target.backend == "cuda" else "registers"
        failures.append(f"{finding.spills} {unit} spilled")
    if finding.cooperative and finding.registers > REGISTER_LIMIT:
        failures.append(
            f"{finding.registers} registers in a cooperative launch: at most {REGISTER_LIMIT}, or "
            "its programs cannot all be resident together"
        )
    if finding.cooperative and finding.shared_bytes > SHARED_LIMIT:
        failures.append(
            f"{finding.shared_bytes} bytes of shared memory in a cooperative launch: at most "
            f"{SHARED_LIMIT}, or its programs cannot all be resident together"
        )
    if case.bytes_per_element is None:
        return
    threads = int(compiled.metadata.num_warps) * target.warp_size
    elements = int(launch.arguments["BLOCK"]) // threads
    try:
        finding.bytes_per_element = moved_bytes(case, accesses, elements)
    except ValueError as error:
        failures.append(str(error))
    for store in (False, True):
        meant = sum(a.store is store and a.bits >= WIDE for a in accesses if not a.scratch)
        found = sum(a.store is store and a.bits >= WIDE for a in emitted)
        if found < meant:
            kind = "stores" if store else "loads"
            failures.append(f"{meant} 128-bit {kind} were meant, {found} are in the assembly")


def _audit_named(task: tuple[str, str]) -> Finding:
    case, target = task
    return audit({c.name: c for c in cases()}[case], TARGETS[target])


def run(
    chosen: Sequence[Case], targets: Sequence[Target], jobs: int, log: Callable[[str], None]
) -> list[Finding]:
    """Audits cases for targets, in ``jobs`` processes; in this one when there is one job."""
    pairs = [(case, target) for case in chosen for target in targets]
    if jobs <= 1:
        return [audit(case, target) for case, target in pairs]
    tasks = [(case.name, target.name) for case, target in pairs]
    # Spawned, not forked: torch and LLVM have started threads by now.
    context = multiprocessing.get_context("spawn")
    findings = []
    with ProcessPoolExecutor(min(jobs, len(tasks)), context) as pool:
        for finding in pool.map(_audit_named, tasks):
            findings.append(finding)
            if len(findings) % 50 == 0:
                log(f"{len(findings)} of {len(tasks)} compiled")
    return findings


# --------------------------------------------------------------------------- output

_COLUMNS = (
    ("launch", "<"),
    ("target", "<"),
    ("registers", ">"),
    ("spills", ">"),
    ("shared", ">"),
    ("widest", ">"),
    ("bytes/element", ">"),
    ("floor", ">"),
    ("", "<"),
)


def _cells(finding: Finding) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    known = finding.known_bytes
    moved = number(finding.bytes_per_element)
    if known is not None and finding.bytes_per_element != known and not finding.skipped:
        moved += f" (known: {known})"
    state = "FAIL" if finding.failures else "skipped" if finding.skipped else "ok"
    return [
        finding.case,
        finding.target,
        number(finding.registers) + ("*" if finding.cooperative else ""),
        number(finding.spills),
        number(finding.shared_bytes),
        number(finding.widest_bits),
        moved,
        number(finding.floor_bytes),
        state,
    ]


def table(findings: Sequence[Finding]) -> str:
    """The findings as a plain-text table."""
    rows = [[title for title, _ in _COLUMNS], *(_cells(finding) for finding in findings)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    previous = ""
    for row in rows:
        shown = [("" if row[0] == previous else row[0]), *row[1:]]
        previous = row[0]
        cells = [f"{c:{a}{w}}" for c, (_, a), w in zip(shown, _COLUMNS, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """What failed, what was skipped, and the totals."""
    lines = ["* cooperative launch: all programs must be resident together."]
    for finding in findings:
        for failure in finding.failures:
            lines.append(f"FAIL {finding.case}, {finding.target}: {failure}")
    for reason in sorted({finding.skipped for finding in findings if finding.skipped}):
        count = sum(finding.skipped == reason for finding in findings)
        lines.append(f"skipped {count}: {reason}")
    failed = sum(bool(finding.failures) for finding in findings)
    compiled = sum(not finding.skipped for finding in findings)
    lines.append(
        f"{compiled} compiled, {failed} failed, Triton {triton.__version__}, {seconds:.0f} s"
    )
    return "\n".join(lines)


def write_json(path: Path, findings: Sequence[Finding]) -> None:
    """Writes the findings, with the versions that they hold for."""
    report = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "register_limit": REGISTER_LIMIT,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m triton_hybrid.kernels.audit",
        description="Compiles every kernel for every target, without a GPU, and checks registers, "
        "spills, access widths and bytes moved.",
    )
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="default: all; may be repeated"
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="NAME",
        help="a kernel (adamw, predict, ...) or part of a launch's name; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes"
    )
    return parser


def _chosen(names: Sequence[str] | None) -> list[Case]:
    every = cases()
    if names is None:
        return every
    return [c for c in every if any(name == c.kernel or name in c.name for name in names)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the audit; returns the exit status."""
    options = _parser().parse_args(arguments)
    chosen = _chosen(options.kernel)
    if not chosen:
        known = sorted({case.kernel for case in cases()})
        print(f"--kernel {options.kernel}: no such launch; kernels are {known}", file=sys.stderr)
        return 2
    if INTERPRETED or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "TRITON_INTERPRET is set: kernels are interpreted then, and nothing can be compiled. "
            "Run the audit without it.",
            file=sys.stderr,
        )
        return 2
    targets = [TARGETS[name] for name in options.target or TARGETS]
    if options.target is None:
        young = [t.name for t in targets if t.oldest_triton > triton_version()]
        targets = [t for t in targets if t.name not in young]
        if young:
            print(f"left out, too new for Triton {triton.__version__}: {', '.join(young)}")
    begin = time.perf_counter()
    log = functools.partial(print, file=sys.stderr, flush=True)
    findings = run(chosen, targets, options.jobs, log)
    print(table(findings))
    print(summary(findings, time.perf_counter() - begin))
    if options.json is not None:
        write_json(options.json, findings)
    return 1 if any(finding.failures for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
