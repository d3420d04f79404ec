"""What a soak run measures, and what counts as growth."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

SETTLED = 100  # steps of a leg in which memory may still be allocated
EXACT = ("tensors", "tensor_bytes", "device_bytes", "state_bytes")  # at equal points
# Part of a leg's samples at either end whose median counts as where resident memory began and
# ended: a single sample catches the allocator in any mood.
RESIDENT_SHARE = 0.2
# Least allowance for resident memory: Python takes it from the system by the megabyte, its
# arenas, and whether a run takes one more is chance.
RESIDENT_FLOOR = 2**20
NOISE_FACTOR = 2  # allowance for resident memory, as a multiple of what the control moved by
KINDS_SHOWN = 4

# Shape, dtype and device type: to tell what is new when there are more tensors.
Kind = tuple[tuple[int, ...], str, str]


@dataclass(frozen=True)
class Sample:
    """Memory at one point."""

    step: int  # of the whole run
    leg: str
    leg_step: int
    drive: str
    phase: str  # of the coming step
    state_bytes: int  # what the optimizer reports, on the device and on the host
    tensors: int  # that are alive
    tensor_bytes: int  # of their storages, each counted once
    device_bytes: int  # allocated on the GPU; without one the bytes of all tensors
    resident_bytes: int  # of the process

    @property
    def point(self) -> tuple[str, str, str]:
        """Samples of one point must be alike."""
        return self.leg, self.drive, self.phase


@dataclass(frozen=True)
class Growth:
    """Something that grew."""

    quantity: str
    where: str
    before: int
    after: int  # the largest value later
    first_step: int
    last_step: int
    detail: str = ""  # what is there now and was not there then

    def __str__(self) -> str:
        text = (
            f"{self.quantity} grew by {self.after - self.before:,} ({self.where}): "
            f"{self.before:,} at step {self.first_step:,}, {self.after:,} at step "
            f"{self.last_step:,}"
        )
        return f"{text}; new: {self.detail}" if self.detail else text


def live_tensors() -> list[Tensor]:
    """Every tensor that Python knows of, and the gradients they hold.

    Rubbish is collected first, so a reference cycle is no growth.
    """
    gc.collect()
    # By type() and not isinstance(): the latter asks lazy modules for their __class__.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    gradients = [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return list({id(tensor): tensor for tensor in found + gradients}.values())


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Resident memory of this process, after freed memory was given back."""
    # The C library keeps freed memory at will; only glibc can be asked for it.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def measure(device: torch.device, **where: Any) -> tuple[Sample, Counter[Kind]]:
    """Takes a sample of the process, and counts the tensors of each kind.

    Where the run is, and ``state_bytes``, cannot be measured and are given.
    """
    tensors = live_tensors()
    tensor_bytes = storage_bytes(tensors)
    on_gpu = device.type == "cuda"
    sample = Sample(
        **where,
        tensors=len(tensors),
        tensor_bytes=tensor_bytes,
        device_bytes=torch.cuda.memory_allocated(device) if on_gpu else tensor_bytes,
        resident_bytes=resident_bytes(),
    )
    return sample, Counter((tuple(t.shape), str(t.dtype), t.device.type) for t in tensors)


class Watch:
    """Keeps the samples, and notices what grows from one to the next at an equal point."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._references: dict[tuple[str, str, str], tuple[Sample, Counter[Kind]]] = {}
        self._growths: dict[tuple[str, tuple[str, str, str]], Growth] = {}
        self.left: list[dict[str, Any]] = []  # what each leg left behind
        self.left_growths: list[Growth] = []

    def add(self, sample: Sample, kinds: Counter[Kind]) -> None:
        """Takes a sample, and how many tensors there were of each kind."""
        self.samples.append(sample)
        if sample.leg_step < SETTLED:
            return
        reference, known = self._references.setdefault(sample.point, (sample, kinds))
        for quantity in EXACT:
            before, after = getattr(reference, quantity), getattr(sample, quantity)
            worst = self._growths.get((quantity, sample.point))
            if after > (worst.after if worst else before):
                where, detail = " ".join(sample.point), _described(kinds - known)
                self._growths[quantity, sample.point] = Growth(
                    quantity, where, before, after, reference.step, sample.step,
                    detail if quantity != "state_bytes" else "",
                )  # fmt: skip

    def leave(self, leg: str, step: int) -> None:
        """Measures what a leg has left behind, after so many steps of the run."""
        tensors = live_tensors()
        counts = {"tensors": len(tensors), "tensor_bytes": storage_bytes(tensors)}
        self.left.append({"leg": leg, "step": step, **counts})
        # The first leg leaves what the process keeps for good, such as torch's constants.
        first = self.left[0]
        for name, now in counts.items():
            if now > first[name]:
                values = first[name], now, first["step"], step
                self.left_growths.append(Growth(f"{name} left behind", f"after {leg}", *values))

    @property
    def growths(self) -> list[Growth]:
        """Everything that grew, the largest share first."""
        return sorted(self._growths.values(), key=lambda x: -x.after / max(x.before, 1))

    @property
    def points(self) -> dict[str, int]:
        """How many samples were compared at each point."""
        settled = [sample for sample in self.samples if sample.leg_step >= SETTLED]
        return dict(sorted(Counter(" ".join(sample.point) for sample in settled).items()))


def _described(new: Counter[Kind]) -> str:
    parts = [
        f"{count} x {dtype.removeprefix('torch.')} {list(shape)} on {device}"
        for (shape, dtype, device), count in new.most_common(KINDS_SHOWN)
    ]
    more = len(new) - len(parts)
    return ", ".join(parts) + (f" and {more} other kinds" if more > 0 else "")


@dataclass(frozen=True)
class ResidentGrowth:
    """How resident memory moved in the legs of a run, after the first steps of each."""

    growth: int  # median of a leg's last samples minus that of its first, of all legs together
    spread: int  # largest minus smallest of a leg, of the leg where that is largest


def settled_legs(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the samples of each leg without those of its first steps.

    What a new dynamics model loads, such as a linear algebra library, comes there.
    """
    settled = [sample for sample in samples if sample.leg_step >= SETTLED]
    return [list(leg) for _, leg in groupby(settled, key=lambda x: x.step - x.leg_step)]


def resident_growth(samples: Sequence[Sample]) -> ResidentGrowth:
    """Returns how resident memory moved, from all samples of a run."""
    growth, spread = 0.0, 0
    for leg in settled_legs(samples):
        values = [sample.resident_bytes for sample in leg]
        count = max(1, int(RESIDENT_SHARE * len(values)))
        growth += statistics.median(values[-count:]) - statistics.median(values[:count])
        spread = max(spread, max(values) - min(values))
    return ResidentGrowth(int(growth), spread)


def allowance(control: ResidentGrowth | None) -> int:
    """Returns by how much resident memory may grow, from how it moved without any leak."""
    noise = max(abs(control.growth), control.spread) if control else 0
    return max(RESIDENT_FLOOR, NOISE_FACTOR * noise)
