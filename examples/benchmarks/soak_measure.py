"""What a soak run measures, and what counts as growth."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

SETTLED = 100
"""Steps of a leg in which memory may still be allocated."""
EXACT = ("tensors", "tensor_bytes", "device_bytes", "state_bytes")
"""What must not grow at all, at equal points."""
RESIDENT_SHARE = 0.2
"""Part of a leg's samples at either end whose median counts as where resident memory began and
ended: a single sample catches the allocator in any mood."""
RESIDENT_FLOOR = 2**20
"""Least allowance for resident memory: Python takes it from the system by the megabyte, its
arenas, and whether a run takes one more is chance."""
NOISE_FACTOR = 2
"""Allowance for resident memory, as a multiple of what the control moved by."""
KINDS_SHOWN = 4

Kind = tuple[tuple[int, ...], str, str]


@dataclass(frozen=True)
class Sample:
    """Memory at one point.

    Attributes:
        step: Steps of the whole run so far.
        leg: Which leg of the run.
        leg_step: Steps of that leg so far.
        drive: The optimizer's drive.
        phase: Phase of the coming step.
        tensors: Tensors that are alive.
        tensor_bytes: Bytes of their storages, each counted once.
        device_bytes: Allocated on the GPU; without one the bytes of all tensors.
        state_bytes: What the optimizer reports of its state, on the device and on the host.
        resident_bytes: Resident memory of the process.
    """

    step: int
    leg: str
    leg_step: int
    drive: str
    phase: str
    tensors: int
    tensor_bytes: int
    device_bytes: int
    state_bytes: int
    resident_bytes: int

    @property
    def point(self) -> tuple[str, str, str]:
        """Samples of one point must be alike."""
        return self.leg, self.drive, self.phase

    def to_dict(self) -> dict[str, Any]:
        """All fields, for the JSON file."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Growth:
    """Something that grew.

    Attributes:
        quantity: What.
        where: At which point.
        before: Its value where it should have stayed.
        after: Its largest value later.
        first_step: Step of the first.
        last_step: Step of the last.
        detail: What is there now and was not there then.
    """

    quantity: str
    where: str
    before: int
    after: int
    first_step: int
    last_step: int
    detail: str = ""

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
    known = {id(tensor) for tensor in found}
    for tensor in list(found):
        grad = tensor.grad if tensor.is_leaf else None
        if grad is not None and id(grad) not in known:
            known.add(id(grad))
            found.append(grad)
    return found


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            continue
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Resident memory of this process, after freed memory was given back."""
    # The C library keeps freed memory at will; only glibc can be asked for it.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def kinds_of(tensors: Sequence[Tensor]) -> Counter[Kind]:
    """How many tensors there are of each shape, dtype and device."""
    return Counter((tuple(t.shape), str(t.dtype), t.device.type) for t in tensors)


def measure(
    step: int, leg: str, leg_step: int, drive: str, phase: str, state_bytes: int, device: Any
) -> tuple[Sample, Counter[Kind]]:
    """Takes a sample.

    Args:
        step: Steps of the whole run so far.
        leg: Which leg of the run.
        leg_step: Steps of that leg so far.
        drive: The optimizer's drive.
        phase: Phase of the coming step.
        state_bytes: What the optimizer reports.
        device: Where the model is.

    Returns:
        The sample, and the kinds of tensors, to tell what is new when there are more.
    """
    tensors = live_tensors()
    tensor_bytes = storage_bytes(tensors)
    on_gpu = device.type == "cuda"
    sample = Sample(
        step=step,
        leg=leg,
        leg_step=leg_step,
        drive=drive,
        phase=phase,
        tensors=len(tensors),
        tensor_bytes=tensor_bytes,
        device_bytes=torch.cuda.memory_allocated(device) if on_gpu else tensor_bytes,
        state_bytes=state_bytes,
        resident_bytes=resident_bytes(),
    )
    return sample, kinds_of(tensors)


class Watch:
    """Keeps the samples, and notices what grows from one to the next at an equal point."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._references: dict[tuple[str, str, str], tuple[Sample, Counter[Kind]]] = {}
        self._growths: dict[tuple[str, tuple[str, str, str]], Growth] = {}

    def add(self, sample: Sample, kinds: Counter[Kind]) -> None:
        """Takes a sample.

        Args:
            sample: What was measured.
            kinds: How many tensors there were of each kind.
        """
        self.samples.append(sample)
        if sample.leg_step < SETTLED:
            return
        reference, known = self._references.setdefault(sample.point, (sample, kinds))
        for quantity in EXACT:
            before, after = getattr(reference, quantity), getattr(sample, quantity)
            worst = self._growths.get((quantity, sample.point))
            if after > (before if worst is None else worst.after):
                self._growths[quantity, sample.point] = Growth(
                    quantity,
                    " ".join(sample.point),
                    before,
                    after,
                    reference.step,
                    sample.step,
                    _describe(kinds - known) if quantity != "state_bytes" else "",
                )

    @property
    def growths(self) -> list[Growth]:
        """Everything that grew, the largest share first."""
        return sorted(
            self._growths.values(),
            key=lambda growth: growth.after / max(growth.before, 1),
            reverse=True,
        )

    @property
    def points(self) -> dict[str, int]:
        """How many samples were compared at each point."""
        compared: Counter[str] = Counter(
            " ".join(sample.point) for sample in self.samples if sample.leg_step >= SETTLED
        )
        return dict(sorted(compared.items()))


def _describe(new: Counter[Kind]) -> str:
    parts = [
        f"{count} x {dtype.removeprefix('torch.')} {list(shape)} on {device}"
        for (shape, dtype, device), count in new.most_common(KINDS_SHOWN)
    ]
    more = len(new) - len(parts)
    return ", ".join(parts) + (f" and {more} other kinds" if more > 0 else "")


@dataclass(frozen=True)
class ResidentGrowth:
    """How resident memory moved in the legs of a run, after the first steps of each.

    Attributes:
        growth: Median of a leg's last samples minus that of its first, of all legs together.
        spread: Largest minus smallest of a leg, of the leg where that is largest.
    """

    growth: int
    spread: int

    @property
    def noise(self) -> int:
        """The larger of both movements: what must be expected where nothing leaks."""
        return max(abs(self.growth), self.spread)


def settled_legs(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the samples of each leg without those of its first steps.

    What a new dynamics model loads, such as the linear algebra of `subspace`, comes there.

    Args:
        samples: All samples of a run.
    """
    legs: list[list[Sample]] = []
    last = 0
    for sample in samples:
        if not legs or sample.leg_step <= last:
            legs.append([])
        last = sample.leg_step
        if sample.leg_step >= SETTLED:
            legs[-1].append(sample)
    return [leg for leg in legs if leg]


def resident_growth(samples: Sequence[Sample]) -> ResidentGrowth:
    """Returns how resident memory moved.

    Args:
        samples: All samples of a run.
    """
    growth, spread = 0.0, 0
    for leg in settled_legs(samples):
        values = [sample.resident_bytes for sample in leg]
        count = max(1, int(RESIDENT_SHARE * len(values)))
        growth += statistics.median(values[-count:]) - statistics.median(values[:count])
        spread = max(spread, max(values) - min(values))
    return ResidentGrowth(int(growth), spread)


def allowance(control: ResidentGrowth | None) -> int:
    """Returns by how much resident memory may grow.

    Args:
        control: How it moved in a run of torch's AdamW; None where there was none.
    """
    return max(RESIDENT_FLOOR, NOISE_FACTOR * control.noise if control else 0)
