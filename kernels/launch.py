"""How the kernels are launched: tiling, options, and whether Triton compiles or interprets."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
"""Warps of a program."""

REGISTERS = 128
"""Most registers a thread may use: four programs fill the 65,536 of a multiprocessor."""

MAX_PROGRAMS = 1024
"""Upper limit of programs in a launch, and so of first-stage partial sums."""


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


def matrix_launch_options(backend: str) -> dict[str, object]:
    """Launch options of the matrix products, but for the number of warps.

    Three buffers hide the loads; AMD's local memory of 64 KiB has room for two.

    Args:
        backend: As for `launch_options`.
    """
    return {"num_stages": 2 if backend == "hip" else 3, "enable_fp_fusion": False}


_BACKEND = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"

LAUNCH = launch_options(_BACKEND)
"""Launch options of the bandwidth kernels but one, on this machine."""

RESIDENT_LAUNCH = launch_options(_BACKEND, resident=True)
"""Launch options of the kernel with a grid barrier, on this machine."""

MATRIX_LAUNCH = matrix_launch_options(_BACKEND)
"""Launch options of the matrix products, on this machine."""
