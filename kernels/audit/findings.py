"""The audit of one launch for one target: what came out, and what is wrong with it."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from triton_hybrid.kernels.audit.assembly import (
    Access,
    amd_resources,
    async_copies,
    gcn_accesses,
    llvm_accesses,
    nvidia_resources,
    nvidia_tool,
    ptx_accesses,
)
from triton_hybrid.kernels.audit.cases import Case, cases
from triton_hybrid.kernels.audit.counts import counted, short_offsets
from triton_hybrid.kernels.audit.mix import gcn_mix, sass_mix
from triton_hybrid.kernels.audit.occupancy import resident_programs
from triton_hybrid.kernels.audit.targets import (
    COOPERATIVE,
    TARGETS,
    Launch,
    Target,
    compile_launch,
)
from triton_hybrid.kernels.launch import REGISTERS

REGISTER_LIMIT = REGISTERS
"""Most registers a thread of a cooperative launch may use."""

MOST_PARKED = 64
"""Bytes a thread may spill where nothing of it is in the loop over elements."""
MOST_LANES = 16
"""The same on AMD, of scalar registers, which go to the lanes of a vector register (with Triton 3.6
14 of the accepting step's, once a launch, and none with 3.9)."""
SHARED_LIMIT = 12 * 1024
"""Most shared memory, in bytes, of a program of a cooperative launch: eight fit everywhere."""

WIDE = 128
"""Bits that an access in a full chunk must have."""

MOST_UNROLLED = 64
"""How often a compiler may repeat the body of a block loop."""


@dataclass
class Finding:
    """What came out for one case and target."""

    case: str
    kernel: str
    target: str
    cooperative: bool = False  # all programs must be resident together
    registers: int | None = None  # of a thread
    spills: int | None = None  # of a thread: bytes of stack (NVIDIA), or registers (AMD)
    shared_bytes: int | None = None  # of a program
    widest_bits: int | None = None  # of a global access
    bytes_per_element: float | None = None  # moved in a full chunk, by its accesses
    known_bytes: int | None = None  # the same by the roles it reads and writes
    ir_bytes: float | None = None  # the same in Triton's IR, repeated ones among them
    flops: int | None = None  # FP32 operations on an element, see ``counts.py``
    fp64_flops: int | None = None
    tensor_flops: int | None = None
    floor_bytes: int | None = None  # what the bare operation has to move
    loads: tuple[int, int] = (0, 0)  # global accesses of 128 bits and more, and narrower ones
    stores: tuple[int, int] = (0, 0)
    warps: int = 0  # of a program
    resident: int | None = None  # programs on a multiprocessor
    mix: dict[str, int] = field(default_factory=dict)  # instructions by kind, where asked for
    seconds: float = 0.0  # to compile
    skipped: str = ""  # why nothing was compiled
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
    # Of a row of bytes a thread with fewer than 16 elements has less than 128 bits, and of one of
    # 16-bit numbers with fewer than 8.
    piece = elements // case.pieces
    reads, writes = (
        sum(size for size in roles if size * piece * 8 >= WIDE) * piece
        for roles in (case.reads, case.writes)
    )
    first, inner = sum(case.first_pass) * elements, sum(case.inner) * piece
    for copies, unrolled in itertools.product(
        range(1, MOST_UNROLLED + 1), range(1, case.times + 1)
    ):
        if stored != copies * writes:
            continue
        passes, left = divmod(loaded - copies * (reads + unrolled * inner), first or 1)
        if left == 0 and (1 <= passes <= MOST_UNROLLED if first else passes == 0):
            return first / elements + sum((*case.reads, *case.writes, *case.inner * case.times))
    raise ValueError(
        "the 128-bit accesses of full chunks do not add up: a thread loads "
        f"{loaded} and stores {stored} bytes by them, its roles are {reads} and {writes} bytes a "
        f"block{f' after {first} in a pass before' if first else ''}; either an access is narrower "
        "than 128 bits, or the kernel moves what its case does not list"
    )


def audit(case: Case, target: Target, with_mix: bool = False) -> Finding:
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
        _check_paper(case, finding)
        if with_mix:
            nvidia = target.gpu.backend == "cuda"
            asm = compiled.asm
            sass = nvidia_tool(asm["cubin"], "nvdisasm", "-c") if nvidia else ""
            finding.mix = sass_mix(sass) if nvidia else gcn_mix(asm["amdgcn"])
    except Exception as error:  # a compiler may raise anything; every case gets its line
        finding.failures.append(f"{type(error).__name__}: {error}")
    return finding


def _inspect(case: Case, target: Target, launch: Launch, compiled: Any, finding: Finding) -> None:
    if target.gpu.backend == "cuda":
        resources = nvidia_resources(compiled.asm["cubin"])
        accesses = emitted = ptx_accesses(compiled.asm["ptx"])
    else:
        resources = amd_resources(compiled.asm["amdgcn"])
        accesses = llvm_accesses(compiled.asm["llir"])
        emitted = gcn_accesses(compiled.asm["amdgcn"])
    finding.registers, finding.spills = resources.registers, resources.spills
    finding.shared_bytes = int(compiled.metadata.shared)
    finding.widest_bits = max((access.bits for access in emitted), default=0)
    finding.warps = int(compiled.metadata.num_warps)
    sizes = (finding.registers, finding.shared_bytes, finding.warps)
    finding.resident = resident_programs(target.name, *sizes)
    failures = finding.failures
    on_nvidia = target.gpu.backend == "cuda"
    # Tiles come by asynchronous copies where the target has them, scalars never do.
    copies = async_copies(compiled.asm["ptx"]) if on_nvidia else []
    finding.loads = _by_width([*copies, *(a.bits for a in emitted if not a.store)])
    finding.stores = _by_width([a.bits for a in emitted if a.store])
    counts = counted(compiled.asm["ttir"], case.times)
    if counts is not None:
        flops = (counts.flops, counts.fp64_flops, counts.tensor_flops)
        finding.flops, finding.fp64_flops, finding.tensor_flops = map(round, flops)
        finding.ir_bytes = round(counts.bytes, 3)
    # A scratch matrix is reached by a long offset and a short one in its row.
    short = 0 if case.products or case.on_paper else short_offsets(compiled.asm["ttir"])
    if short:
        failures.append(f"{short} blocks are reached by 32-bit offsets: tensors may be longer")
    parked = (MOST_PARKED if on_nvidia else MOST_LANES) if case.may_park else 0
    if finding.spills > parked and not case.may_spill:
        unit = "bytes" if on_nvidia else "registers"
        failures.append(f"{finding.spills} {unit} spilled")
    for what, used, most in (
        ("registers", finding.registers, REGISTER_LIMIT),
        ("bytes of shared memory", finding.shared_bytes, SHARED_LIMIT),
    ):
        if finding.cooperative and used > most:
            failures.append(
                f"{used} {what} in a cooperative launch: at most {most}, or its programs cannot "
                "all be resident together"
            )
    if case.products:
        tiles = copies or [a.bits for a in emitted if not a.store and a.bits >= WIDE]
        if not tiles or min(tiles) < WIDE:
            failures.append(
                f"tiles are loaded by accesses of {sorted(set(tiles))} bits: must be 128"
            )
    if case.bytes_per_element is None or case.on_paper is not None:
        return
    for store, kind in ((False, "loads"), (True, "stores")):
        meant = sum(a.store is store and a.bits >= WIDE for a in accesses if not a.scratch)
        found = sum(a.store is store and a.bits >= WIDE for a in emitted)
        if found < meant:
            failures.append(f"{meant} 128-bit {kind} were meant, {found} are in the assembly")
    threads = finding.warps * target.gpu.warp_size
    elements = int(launch.arguments["BLOCK"]) // threads
    finding.bytes_per_element = moved_bytes(case, accesses, elements)


def _by_width(widths: Sequence[int]) -> tuple[int, int]:
    wide = sum(bits >= WIDE for bits in widths)
    return wide, len(widths) - wide


def _check_paper(case: Case, finding: Finding) -> None:
    """Compares the bytes in Triton's IR with those on paper."""
    known = case.bytes_per_element
    if known is None and finding.ir_bytes is None:
        return
    if known is None or finding.ir_bytes != known + case.repeats:
        counted_ones = "none" if finding.ir_bytes is None else f"{finding.ir_bytes:g}"
        again = f" and {case.repeats} once more" if case.repeats else ""
        failure = f"its IR moves {counted_ones} bytes an element, on paper it is {known}{again}"
        finding.failures.append(failure)
    elif case.on_paper is not None:
        finding.bytes_per_element = finding.ir_bytes - case.repeats


def _audit_named(case: str, target: str, with_mix: bool) -> Finding:
    return audit({c.name: c for c in cases()}[case], TARGETS[target], with_mix)


def run(
    chosen: Sequence[Case],
    targets: Sequence[Target],
    jobs: int,
    log: Callable[[str], None],
    with_mix: bool = False,
) -> list[Finding]:
    """Audits cases for targets, in ``jobs`` processes; in this one when there is one job."""
    pairs = [(case, target) for case in chosen for target in targets]
    if jobs <= 1:
        return [audit(case, target, with_mix) for case, target in pairs]
    names = zip(*((case.name, target.name, with_mix) for case, target in pairs))
    # Spawned, not forked: torch and LLVM have started threads by now.
    context = multiprocessing.get_context("spawn")
    findings: list[Finding] = []
    with ProcessPoolExecutor(min(jobs, len(pairs)), context) as pool:
        for finding in pool.map(_audit_named, *names):
            findings.append(finding)
            if len(findings) % 50 == 0:
                log(f"{len(findings)} of {len(pairs)} compiled")
    return findings
