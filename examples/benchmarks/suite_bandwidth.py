"""Section 3: how many bytes a second each kernel moves, beside a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from suite_context import DTYPES, Context, release_memory
from suite_gpt2_shapes import gpt2_small_shapes
from suite_kernels import ADAMW_VARIANTS
from suite_problems import GROUPS, HISTORY, STATE, Launches, hyper_table
from suite_records import UNKNOWN, Row, SectionResult, Timing
from suite_timing import device_timing
from triton_hybrid.kernels.adamw import Workspace, adamw_step
from triton_hybrid.kernels.chunks import TensorSet
from triton_hybrid.kernels.correct import correct, slopes
from triton_hybrid.kernels.divergence import FRACTION_COLUMN
from triton_hybrid.kernels.gram import gram
from triton_hybrid.kernels.ledger import INDEX, new_ledger
from triton_hybrid.kernels.predict import predict

# Neither the number of tensors nor that of chunks is a multiple of 16, in all three alike:
# Triton compiles other code for such numbers, and each size would measure another kernel.
SIZES: dict[str, list[int]] = {
    "124M": [shape.numel() for shape in map(torch.Size, gpt2_small_shapes())],
    "1M": [87_380] * 12,
    "1B": [33_333_333] * 30,
}
REPEATS = {"124M": 20, "1M": 40, "1B": 12}
CACHES = 4
"""Buffers are rotated until they are this many times the second-level cache."""


@dataclass(frozen=True)
class Traffic:
    """Bytes a kernel moves for each parameter.

    Attributes:
        read: Each input once.
        written: Each output once.
        again: Read a second time, because the first reading decides what the second one does.
    """

    read: int
    written: int
    again: int = 0

    @property
    def counted(self) -> int:
        """The fewest that any program with this result can move."""
        return self.read + self.written

    @property
    def moved(self) -> int:
        """What this kernel moves."""
        return self.counted + self.again


def traffic(kernel: str, dtype: torch.dtype) -> Traffic:
    """Bytes a parameter; state, masters and FP32 parameters have four, FP64 is not measured.

    Args:
        kernel: One of `KERNELS`.
        dtype: Of parameters and gradients.
    """
    half = dtype.itemsize == 2
    grad = dtype.itemsize
    # The 16-bit parameter is written beside its master and never read.
    param = 2 if half else 0
    return {
        "adamw": Traffic(12 + grad, 12 + param, again=grad),
        "adamw+clip": Traffic(12 + grad, 12 + param, again=grad),
        "adamw+slow": Traffic(20 + grad, 20 + param, again=grad + 4),
        "adamw+clip+slow": Traffic(20 + grad, 20 + param, again=grad + 4),
        "predict slow": Traffic(20, 8 + param),
        "predict trajectory": Traffic(8 + 4 * HISTORY, 4 + param),
        "gram": Traffic(8 + 4 * (HISTORY - 1), 8),
        "slopes": Traffic(8 + grad, 0),
        "correct": Traffic(8, 4 + param),
    }[kernel]


class Buffers:
    """Parameters of one size with all their roles, filled with random numbers.

    Args:
        lengths: Of the tensors.
        dtype: Of parameters and gradients.
        device: Where they are.
        tiling: As in `TensorSet`.
    """

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, device: torch.device, tiling: Any = None
    ) -> None:
        half = dtype.itemsize == 2

        def normal(kind: torch.dtype, size: float) -> list[torch.Tensor]:
            return [torch.randn(n, dtype=kind, device=device).mul_(size) for n in lengths]

        rows = {"weight": normal(torch.float32, 1.0)}
        rows["param"] = [w.to(dtype) for w in rows["weight"]] if half else rows["weight"]
        rows["grad"] = normal(dtype, 1.0)
        for name in STATE:
            rows[name] = normal(torch.float32, 0.1)
        for square in rows["exp_avg_sq"]:
            square.abs_().add_(0.2)
        self.set = TensorSet(rows, tiling)
        count = len(lengths)
        self.group = torch.zeros(count, dtype=torch.int32, device=device)
        self.steps = torch.full((count,), 10.0, device=device)
        # Small enough that hundreds of steps leave every number ordinary.
        self.hyper = hyper_table([{**GROUPS[0], "lr": 1e-5}], device)
        self.ledger = new_ledger(device)
        # A ledger of its own, where AdamW does not write its doubts about random numbers: with a
        # closed gate or without a verdict a kernel would do nothing, very fast.
        self.decided = new_ledger(device)
        for name, value in {"confidence": 0.9, "update_square": 1.0, "verdict": 1.0}.items():
            self.decided[INDEX[name]] = value
        self.memory = torch.tensor([[1.0, 0.0, 1.0]] * count).to(device)
        self.memory[:, FRACTION_COLUMN.value] = 0.625
        self.coefficients = torch.full((count, HISTORY), 0.01, device=device)
        self.sums = torch.zeros(count, 3, dtype=torch.float64, device=device)
        self.products = torch.zeros(count, HISTORY, dtype=torch.float64, device=device)
        self.workspace = Workspace([self.set])
        room = self.set.chunks(every=True).count
        self.partials = torch.zeros(room * HISTORY, device=device)

    def scratch(self, columns: int) -> torch.Tensor:
        """Room for the chunk sums of a kernel."""
        return self.partials[: self.set.chunks(every=True).count * columns]


def _adamw(name: str) -> Callable[[Buffers], None]:
    options = ADAMW_VARIANTS[name]

    def run(b: Buffers) -> None:
        adamw_step(
            [b.set], [b.group], [b.steps], b.hyper, b.ledger, b.workspace,
            observed=options["slow_beta"] > 0, **options,
        )  # fmt: skip

    return run


def _predict(b: Buffers, coefficients: torch.Tensor | None) -> None:
    predict(
        b.set, b.group, b.steps, b.hyper, coefficients, b.memory, b.decided, b.scratch(3), b.sums,
        threshold=0.5, share=1.0, save=coefficients is None,
    )  # fmt: skip


KERNELS: dict[str, Callable[[Buffers], None]] = {
    **{name: _adamw(name) for name in ADAMW_VARIANTS},
    "predict slow": lambda b: _predict(b, None),
    "predict trajectory": lambda b: _predict(b, b.coefficients),
    "gram": lambda b: gram(b.set, HISTORY, 2, b.scratch(HISTORY), b.products),
    "slopes": lambda b: slopes(b.set, b.group, b.hyper, b.ledger, b.scratch(3), b.sums),
    "correct": lambda b: correct(b.set, b.memory, b.decided, restart=False),
}
"""Kernels as the optimizer launches them, their second stage included."""


@dataclass
class SizeResult:
    """One kernel at one size.

    Attributes:
        parameters: How many.
        milliseconds: Of the device.
        gigabytes_per_second: Counted bytes (each input and output once) over the median time.
        of_copy: That over the copy's bandwidth.
        of_copy_moved: The same with the bytes that are read twice counted twice.
        buffers: How many sets of tensors were rotated.
    """

    parameters: int
    milliseconds: Timing
    gigabytes_per_second: float
    of_copy: float
    of_copy_moved: float
    buffers: int


@dataclass
class BandwidthRow(Row):
    """One kernel with parameters of one dtype, at every size."""

    HEAD: ClassVar[tuple[str, ...]] = (
        "kernel", "dtype", "B/param",
        "1M GB/s", "of copy", "124M GB/s", "of copy", "p20-p80 ms", "1B GB/s", "of copy",
    )  # fmt: skip
    kernel: str
    dtype: str
    bytes_counted: int
    bytes_read_again: int
    sizes: dict[str, SizeResult] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        again = f"+{self.bytes_read_again}" if self.bytes_read_again else ""
        cells = [self.kernel, self.dtype, f"{self.bytes_counted}{again}"]
        for size in ("1M", "124M", "1B"):
            found = self.sizes.get(size)
            cells.append(f"{found.gigabytes_per_second:.0f}" if found else UNKNOWN)
            cells.append(f"{found.of_copy:.2f}" if found else UNKNOWN)
            if size == "124M":
                timing = found.milliseconds if found else None
                cells.append(f"{timing.p20:.3f}-{timing.p80:.3f}" if timing else UNKNOWN)
        return tuple(cells)


def bandwidth(context: Context, result: SectionResult) -> None:
    """Measures every kernel whose checks hold, at every size that fits."""
    cache = cache_bytes(context.device)
    rows: dict[tuple[str, str], BandwidthRow] = {}
    for label, dtype in DTYPES.items():
        for kernel in KERNELS:
            if not context.refuses(result, f"{kernel} {label}", [kernel], label):
                bytes_ = traffic(kernel, dtype)
                rows[kernel, label] = BandwidthRow(kernel, label, bytes_.counted, bytes_.again)
    # Shared with the result from the start: what is measured stays if something fails later.
    result.rows.extend(rows.values())
    result.facts["copies"] = copies = {}
    result.facts["resources"] = resources = {}
    for size, lengths in SIZES.items():
        context.check_time()
        parameters = sum(lengths)
        copy = copy_gigabytes_per_second(parameters, cache, context.device)
        copies[size] = copy
        result.title += f"; copy of {size}: {copy['gigabytes_per_second']:.0f} GB/s"
        for label, dtype in DTYPES.items():
            context.check_time()
            wanted = [kernel for kernel in KERNELS if (kernel, label) in rows]
            if not wanted:
                continue
            # 40 bytes a parameter; the leanest kernel reads and writes 10 of them.
            count = -(-CACHES * cache // (10 * parameters))
            what = f"{size} parameters, {label}"
            if not context.has_room(result, what, 42 * parameters * count):
                continue
            buffers = [Buffers(lengths, dtype, context.device) for _ in range(count)]
            for kernel in wanted:
                context.check_time()
                rows[kernel, label].sizes[size] = measure(
                    kernel, dtype, buffers, parameters, REPEATS[size], copy["gigabytes_per_second"]
                )
            if size == "124M":
                resources[label] = kernel_resources(wanted, buffers[0])
            del buffers
            release_memory()


def measure(
    kernel: str,
    dtype: torch.dtype,
    buffers: list[Buffers],
    parameters: int,
    repeats: int,
    copy: float,
) -> SizeResult:
    """Times one kernel.

    Args:
        kernel: Which.
        dtype: Of the parameters.
        buffers: Rotated from call to call.
        parameters: How many each holds.
        repeats: Calls that are timed.
        copy: Gigabytes a second of a copy.
    """
    run = KERNELS[kernel]
    timing = device_timing(lambda number: run(buffers[number % len(buffers)]), repeats)
    bytes_ = traffic(kernel, dtype)
    speed = bytes_.counted * parameters / timing.median / 1e6
    return SizeResult(
        parameters, timing, speed, speed / copy, speed * bytes_.moved / bytes_.counted / copy,
        len(buffers),
    )  # fmt: skip


def copy_gigabytes_per_second(parameters: int, cache: int, device: torch.device) -> dict[str, Any]:
    """A device-to-device copy that reads and writes about as many bytes as AdamW.

    Args:
        parameters: How many AdamW would update: 14 bytes read and 14 written for each.
        cache: Bytes of the second-level cache.
        device: Where.
    """
    release_memory()
    free, _ = torch.cuda.mem_get_info(device)
    length = min(14 * parameters, free // 4)
    count = -(-CACHES * cache // (2 * length))
    pairs = [
        (
            torch.randint(256, (length,), dtype=torch.uint8, device=device),
            torch.empty(length, dtype=torch.uint8, device=device),
        )
        for _ in range(count)
    ]

    def run(number: int) -> None:
        source, target = pairs[number % count]
        target.copy_(source)

    timing = device_timing(run, 20)
    speed = 2 * length / timing.median / 1e6
    return {
        "bytes_read_and_written": 2 * length,
        "gigabytes_per_second": speed,
        "milliseconds": vars(timing),
        "buffers": count,
    }


def kernel_resources(kernels: list[str], buffers: Buffers) -> dict[str, dict[str, int]]:
    """Registers and spills of the compiled kernels, where Triton tells."""
    found = {}
    for kernel in kernels:
        launches = Launches()
        with launches.counted():
            KERNELS[kernel](buffers)
        found[kernel] = next(iter(launches.resources.values()), {})
    return found


def cache_bytes(device: torch.device) -> int:
    """Size of the second-level cache; 64 MiB where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20)
