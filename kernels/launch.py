"""How the kernels are launched: tiling, options, and whether Triton compiles or interprets."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton_hybrid.kernels.capture import NEVER_RUN, refuse_capture

NUM_WARPS = 2
"""A row of 16-bit elements changes hands between the warps of a program, and so does every sum:
the fewer of them wait for each other, the better. Measured on an H200 (Triton 3.6, GPT-2 small's
parameters, share of the copy's bandwidth, 4 warps with blocks of 1024 or 2048, then 2 with 1024):
AdamW's step 0.94 and 0.93, in BF16 with masters 0.81 and 0.91, with slow EMA 0.77 and 0.89, a
prediction along it 0.76 and 0.94, in BF16 0.74 and 0.91. One warp: 0.89, 0.86, 0.80, 0.90, 0.89."""
REGISTERS = 128
"""Most registers a thread may use: eight programs fill the 65,536 of a multiprocessor."""
MAX_PROGRAMS = 4096
"""Upper limit of programs in a launch, and so of first-stage partial sums."""


def require_power_of_two(name: str, value: int) -> None:
    """Refuses what no block of a kernel can have; raises ValueError."""
    if value < 16 or value & (value - 1):
        raise ValueError(f"{name}={value}: must be a power of two of at least 16")


@dataclass(frozen=True)
class Tiling:
    """How a tensor is cut."""

    block: int  # elements that a program holds in registers at a time
    chunk: int  # elements of one table entry; a multiple of the block
    programs: int  # of a launch

    def __post_init__(self) -> None:
        require_power_of_two("block", self.block)
        if self.chunk < self.block or self.chunk % self.block:
            raise ValueError(f"chunk={self.chunk}: must be a multiple of block={self.block}")
        if not 1 <= self.programs <= MAX_PROGRAMS:
            raise ValueError(f"programs={self.programs}: must be in [1, {MAX_PROGRAMS}]")


def gpu_tiling(processors: int, itemsize: int = 4) -> Tiling:
    """The tiling for a GPU of so many multiprocessors, and weights of ``itemsize`` bytes.

    A block is four 128-bit accesses of each thread to a row of the weights' width (or two to
    a row of half that width), under way together (half of it where warps are twice as wide: the
    slow EMA's step has no more registers there); the blocks of a chunk share its table look-ups;
    8 programs on each multiprocessor are certain to be resident together at up to ``REGISTERS``
    registers a thread, which the grid barrier of a cooperative launch needs.
    """
    return Tiling(4096 // itemsize, 8192, min(8 * processors, MAX_PROGRAMS))


def default_tiling(device: torch.device, itemsize: int = 4) -> Tiling:
    """The tiling for a device and weights of ``itemsize`` bytes."""
    # In the interpreter a block costs the same whatever its size.
    if device.type != "cuda":
        return Tiling(1 << 16, 1 << 16, 1)
    properties = torch.cuda.get_device_properties(device)
    return gpu_tiling(properties.multi_processor_count, itemsize)


@triton.jit
def _probe(pointer):
    tl.store(pointer, 1)


INTERPRETED = type(_probe).__name__ == "InterpretedFunction"
"""Whether Triton runs kernels by its interpreter (``TRITON_INTERPRET=1`` at import)."""


_NOWHERE_ELSE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device current for a launch; does nothing elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else _NOWHERE_ELSE


class Launch(NamedTuple):
    """A launch with all its arguments: `again` makes it, as often as these are the right ones."""

    kernel: Any
    again: Callable[[], Any]


def prepared(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Launch:
    """What ``kernel[grid](*arguments, **constants)`` would launch."""
    # By place, as far as it goes: 20 arguments by name cost Python half a microsecond a launch.
    places = itertools.takewhile(constants.__contains__, kernel.arg_names[len(arguments) :])
    arguments += tuple([constants.pop(name) for name in places])
    run = functools.partial(kernel.run, *arguments, grid=grid, warmup=False, **constants)
    return Launch(kernel, run)


def start(launches: Iterable[Launch], device: torch.device) -> None:
    """Makes launches on a device, perhaps the first ones of their kernels.

    Raises:
        RuntimeError: A CUDA graph is being captured, and the driver loads no kernel meanwhile.
    """
    with on_device(device):
        for launch in launches:
            try:
                launch.again()
            except RuntimeError:
                refuse_capture(device, NEVER_RUN)
                raise
            settle(launch.kernel)


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


def settle(kernel: Any) -> None:
    """Lets further launches of a kernel cost less; to be called after the first.

    At each launch Triton compares every global constant that a kernel reads with what it was when
    compiled: 50 µs for the 48 of a base step, where all else takes 20. Ours never change.
    """
    constants_read = getattr(kernel, "used_global_vals", None)
    if constants_read:
        constants_read.clear()


def launch_options(backend: str, resident: bool = False) -> dict[str, object]:
    """Options of a bandwidth kernel for the backend "cuda", "hip" or "interpreter".

    FP fusion is off so that compiled code, interpreter and plain torch round alike; the kernels
    wait for memory, so it costs nothing. Registers are limited: on NVIDIA by number, on AMD by
    how many waves must share the 512 of a unit. ``resident``: all programs of the launch must be
    resident together, for which 4 waves allow no more than ``REGISTERS``; a compiler that took
    more would make the device refuse a cooperative launch.
    """
    limits = {"cuda": {"maxnreg": REGISTERS}, "hip": {"waves_per_eu": 4 if resident else 3}}
    common = {"num_warps": NUM_WARPS, "num_stages": 1, "enable_fp_fusion": False}
    return {**common, **limits.get(backend, {})}


def matrix_launch_options(backend: str) -> dict[str, object]:
    """Options of the matrix products, but for the number of warps.

    Three buffers hide the loads; AMD's local memory of 64 KiB has room for two.
    """
    return {"num_stages": 2 if backend == "hip" else 3, "enable_fp_fusion": False}


_BACKEND = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"
# On this machine: of the bandwidth kernels, of the one with a grid barrier, of matrix products.
LAUNCH = launch_options(_BACKEND)
RESIDENT_LAUNCH = launch_options(_BACKEND, resident=True)
MATRIX_LAUNCH = matrix_launch_options(_BACKEND)
