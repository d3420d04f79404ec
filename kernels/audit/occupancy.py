"""How many programs a multiprocessor keeps resident, from what one of them takes.

Limits of NVIDIA's are from the CUDA programming guide (technical specifications of each compute
capability), those of gfx942 from AMD's CDNA3 instruction set architecture: 512 vector registers a
lane in each of 4 units, 8 waves a unit, 64 KiB of local memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What all resident programs share."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65_536  # of 32 bits
    lanes: int = 32  # threads of a warp
    reserved_bytes: int = 1024  # of shared memory, for each program


PROCESSORS = {
    "sm_80": Processor(64, 32, 164 << 10),
    "sm_90": Processor(64, 32, 228 << 10),
    "sm_100": Processor(64, 32, 228 << 10),
    "sm_120": Processor(48, 24, 100 << 10),
    "gfx942": Processor(32, 16, 64 << 10, registers=4 * 512 * 64, lanes=64, reserved_bytes=0),
}
STEP = 8
"""Registers of a thread are given out in steps of it."""


def resident_programs(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that a multiprocessor keeps resident.

    Args:
        target: Name of the target.
        registers: Of a thread.
        shared_bytes: Of a program.
        warps: Of a program.
    """
    has = PROCESSORS[target]
    of_warp = -(-max(registers, 1) // STEP) * STEP * has.lanes
    # Warps are spread over four units, each with a quarter of the registers.
    by_registers = 4 * (has.registers // 4 // of_warp) // warps
    taken = shared_bytes + has.reserved_bytes
    by_memory = has.shared_bytes // taken if taken else has.programs
    return min(has.programs, has.warps // warps, by_registers, by_memory)


def occupancy(target: str, resident: int, warps: int) -> float:
    """Share of a multiprocessor's warps that so many programs are."""
    return resident * warps / PROCESSORS[target].warps
