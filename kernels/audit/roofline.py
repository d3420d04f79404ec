"""How long a launch takes at least, by its bytes and its operations.

A bound from the published peaks of a device and no measurement. Elements are GPT-2 small's
parameters, or what Muon takes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triton_hybrid.kernels.audit.cases import Case
from triton_hybrid.kernels.audit.counts import Counts
from triton_hybrid.kernels.audit.findings import Finding

PARAMETERS = 124_439_808
"""Of GPT-2 small."""
MATRICES = ((768, 768, 48), (768, 3072, 24))
"""Height, width and number of its hidden matrices, queries, keys and values each by itself."""


@dataclass(frozen=True)
class Device:
    """Published peaks, without sparsity: bytes and operations a second."""

    name: str
    bandwidth: float
    fp32: float
    fp64: float
    tensor: float  # BF16, accumulated in FP32


DEVICES = (
    Device("A100", 2.039e12, 19.5e12, 9.7e12, 312e12),  # 80 GB SXM; NVIDIA's A100 datasheet
    Device("H100", 3.35e12, 67e12, 34e12, 989.5e12),  # SXM; NVIDIA's H100 datasheet
    Device("H200", 4.8e12, 67e12, 34e12, 989.5e12),  # SXM; NVIDIA's H200 datasheet
    # NVIDIA's RTX Blackwell architecture whitepaper; FP64 is 1/64 of FP32.
    Device("RTX 5080", 0.96e12, 56.3e12, 0.88e12, 112.6e12),
)


@dataclass(frozen=True)
class Work:
    """What a launch does as a whole."""

    elements: int
    counts: Counts
    fused: bool = False  # whether a multiplication and an addition are one instruction

    def bound(self, device: Device) -> tuple[float, str]:
        """Seconds that it takes at least, and what they are spent on.

        Peaks count a fused multiplication and addition as two; without fusion half of them is left.
        """
        counts = self.counts
        vector = counts.fp64_flops / device.fp64 + counts.flops / device.fp32
        times = {
            "memory": counts.bytes / device.bandwidth,
            "FLOPs": vector if self.fused else 2 * vector,
            "matrix": counts.tensor_flops / device.tensor,
        }
        longest = max(times, key=lambda kind: times[kind])
        return times[longest], longest


def _product(case: Case, tile: int, itemsize: int) -> Work:
    """One product of every matrix, each operand and result moved once."""
    moved = flops = 0
    for high, wide, count in MATRICES:
        rows = -(-high // tile)
        half = rows * (rows + 1) / 2 * tile * tile  # elements of the triangle that is computed
        size = high * wide
        if "X Xᵀ" in case.name:
            operations, elements = 2 * half * wide, size + high * high
        elif "A A" in case.name:
            operations, elements = 2 * half * high, 2 * high * high
        else:
            operations, elements = 2 * size * high, 2 * size + high * high
        moved += count * itemsize * elements
        flops += count * int(operations)
    tensor = itemsize == 2
    counts = Counts(moved, 0 if tensor else flops, 0, flops if tensor else 0)
    return Work(sum(high * wide * count for high, wide, count in MATRICES), counts, fused=True)


def work(case: Case, finding: Finding) -> Work | None:
    """What a launch does to GPT-2 small; None of one that moves no elements."""
    if case.bytes_per_element is None or finding.flops is None:
        return None
    if case.products:
        half = "bf16" in case.name
        return _product(case, 128 if half else 64, 2 if half else 4)
    of_muon = case.kernel == "muon"
    elements = sum(h * w * n for h, w, n in MATRICES) if of_muon else PARAMETERS
    each = (case.bytes_per_element, finding.flops, finding.fp64_flops or 0)
    return Work(elements, Counts(*(float(elements * value) for value in each)))


def roofline(cases: Sequence[Case], findings: Sequence[Finding]) -> list[list[str]]:
    """A row for each launch: bytes and operations in all, then bound and kind for each device."""
    head = ["launch", "million elements", "GB", "GFLOP"]
    rows = [head + [f"{device.name} ms" for device in DEVICES]]
    by_name = {finding.case: finding for finding in findings if not finding.failures}
    for case in cases:
        done = work(case, by_name[case.name]) if case.name in by_name else None
        if done is None:
            continue
        counts = done.counts
        flops = counts.flops + counts.fp64_flops + counts.tensor_flops
        cells = [case.name, f"{done.elements / 1e6:.0f}"]
        cells += [f"{counts.bytes / 1e9:.2f}", f"{flops / 1e9:.1f}"]
        for device in DEVICES:
            seconds, kind = done.bound(device)
            cells.append(f"{seconds * 1e3:.3f} {kind}")
        rows.append(cells)
    return rows
