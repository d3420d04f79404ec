"""The audit of one launch for one target: what came out, and what is wrong with it."""

from __future__ import annotations

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
    ptx_accesses,
)
from triton_hybrid.kernels.audit.cases import Case, cases
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

SHARED_LIMIT = 16 * 1024
"""Most shared memory, in bytes, of a program of a cooperative launch: four fit everywhere."""

WIDE = 128
"""Bits that an access in a full chunk must have."""

MOST_UNROLLED = 64
"""How often a compiler may repeat the body of a block loop."""


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
    if case.products:
        # Tiles come by asynchronous copies where the target has them, scalars never do.
        tiles = async_copies(compiled.asm["ptx"]) if target.backend == "cuda" else []
        tiles = tiles or [a.bits for a in emitted if not a.store and a.bits >= WIDE]
        if not tiles or min(tiles) < WIDE:
            failures.append(
                f"tiles are loaded by accesses of {sorted(set(tiles))} bits: must be 128"
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
