"""What a training run of GPT-2 did, step by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.files import plain
from lib.run_store import RunStore

BASELINE, HYBRID, CONTROL, ALONE = "baseline", "hybrid", "control", "base_alone"
MEMORY_OPTIMISED, SIXTEEN_BIT = "memory_optimised", "baseline_16bit"
# Under torchrun: the same once more, in one process.
BASELINE_ONE, HYBRID_ONE = "baseline_one_process", "hybrid_one_process"
ONE_PROCESS = {BASELINE: BASELINE_ONE, HYBRID: HYBRID_ONE}
# Runs of HybridOptimizer, with predictions or without; the others are of torch's AdamW.
HYBRIDS = (HYBRID, ALONE, HYBRID_ONE, MEMORY_OPTIMISED, SIXTEEN_BIT)
ADAMW, MUON = "adamw", "muon"
BASES = {ADAMW: "AdamW", MUON: "Muon"}
FINAL_LOSSES = 5  # the last few batches' mean: the loss of one batch is mostly the batch's own
DIGITS = 6  # of seconds and losses in files


@dataclass(frozen=True)
class StepRecord:
    """One call of ``step()``.

    Attributes:
        phase: The optimizer's phase, or "baseline".
        seconds: Wall-clock time of everything in the step, from batch to zeroed gradients.
        processor_seconds: Processor time of all threads, which other work hardly touches.
        memory_bytes: Of the device at the step's peak, or on a CPU the process's resident memory
            after the step.
        gradients: Gradient evaluations so far; a window of micro-batches is one.
        loss: Training loss of the step's batch; None for a step without one.
    """

    phase: str
    seconds: float
    processor_seconds: float
    memory_bytes: int
    gradients: int
    loss: float | None


STEP_FIELDS = tuple(field.name for field in dataclasses.fields(StepRecord))


@dataclass
class RunRecord:
    """What one run did, filled in while it runs.

    Attributes:
        name: Which run: "baseline", "hybrid" and so on.
        seed: Seed of the initial weights and of the batches.
        planned_steps: How many steps it was to take.
        tokens_per_batch: Tokens a gradient evaluation consumes.
        base: Base rule of hidden matrices, "adamw" or "muon"; all else is AdamW's.
        device: Type of the device it ran on.
        processes: That shared each batch.
        optimizer: Which optimizer exactly.
        held_out_start: Held-out loss before the first step.
        held_out_end: Held-out loss after the last; None where it was not reached.
        held_out_after: Held-out loss after some numbers of gradient evaluations.
        memory_before: Memory in use before the model was built, in bytes.
        memory_peak: Most memory in use in the timed steps, in bytes.
        parameter_bytes: Of the model.
        state_bytes_device: Of the optimizer's state on the model's device.
        state_bytes_host: Of the optimizer's state in host memory, away from the device.
        stats: What HybridOptimizer reports.
        steps: The steps taken.
        windows: Batches accumulated for each gradient.
        noise_scales: After each step, in batches, where windows are adaptive.
    """

    name: str
    seed: int
    planned_steps: int
    tokens_per_batch: int
    base: str = ADAMW
    device: str = "cpu"
    processes: int = 1
    optimizer: str = ""
    held_out_start: float | None = None
    held_out_end: float | None = None
    held_out_after: dict[int, float] = field(default_factory=dict)
    memory_before: int = 0
    memory_peak: int = 0
    parameter_bytes: int = 0
    state_bytes_device: int = 0
    state_bytes_host: int = 0
    stats: dict[str, Any] | None = None
    steps: list[StepRecord] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    noise_scales: list[float | None] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether it took all its steps and its final loss is known."""
        return len(self.steps) == self.planned_steps and self.held_out_end is not None

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return math.fsum(step.seconds for step in self.steps)

    @property
    def processor_seconds(self) -> float:
        """Processor time of all steps."""
        return math.fsum(step.processor_seconds for step in self.steps)

    @property
    def gradients(self) -> int:
        """Gradient evaluations."""
        return self.steps[-1].gradients if self.steps else 0

    @property
    def tokens_per_second(self) -> float:
        """Consumed tokens for each second; predicted steps consume none."""
        batches = sum(self.windows) or self.gradients
        return batches * self.tokens_per_batch / self.seconds if self.steps else 0.0

    @property
    def losses(self) -> list[float]:
        """Training loss at each gradient evaluation."""
        return [step.loss for step in self.steps if step.loss is not None]

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last few gradient evaluations."""
        last = self.losses[-FINAL_LOSSES:]
        return sum(last) / len(last) if last else None

    @property
    def kept_bytes(self) -> int:
        """Parameters, their gradients and the optimizer's state on the device, in bytes.

        On a CPU what is offloaded lies in the same memory, so nothing is saved by it.
        """
        elsewhere = 0 if self.device == "cuda" else self.state_bytes_host
        return 2 * self.parameter_bytes + self.state_bytes_device + elsewhere

    def percent_above(self, other: RunRecord | None) -> float | None:
        """How much higher the final held-out loss is than another run's, in percent."""
        if other is None or not self.held_out_end or not other.held_out_end:
            return None
        return 100 * (self.held_out_end / other.held_out_end - 1)

    def stopped_after(self, gradients: int) -> RunRecord | None:
        """Returns this run as it stood after some gradients; None if it did not measure there."""
        if gradients not in self.held_out_after:
            return None
        return dataclasses.replace(
            self,
            name=CONTROL,
            planned_steps=gradients,
            steps=[step for step in self.steps if step.gradients <= gradients],
            windows=self.windows[:gradients],
            held_out_end=self.held_out_after[gradients],
            held_out_after={},
            stats=None,
        )

    def gradients_to(self, loss: float | None) -> int | None:
        """Gradient evaluations until the held-out loss was this low; None if it never was seen."""
        reached = [n for n, found in self.held_out_after.items() if loss and found <= loss]
        return min(reached, default=None)

    def seconds_to(self, loss: float | None) -> float | None:
        """Wall-clock time of the steps until then."""
        gradients = self.gradients_to(loss)
        last = next((i for i, x in enumerate(self.steps) if x.gradients == gradients), None)
        return None if last is None else math.fsum(x.seconds for x in self.steps[: last + 1])

    def seconds_by_phase(self) -> dict[str, list[float]]:
        """Returns the times of the steps of each phase, phases in the order they came."""
        phases: dict[str, list[float]] = {}
        for step in self.steps:
            phases.setdefault(step.phase, []).append(step.seconds)
        return phases

    def statistic(self, name: str) -> Any:
        """Returns something HybridOptimizer reports, or None where there is no such number."""
        value = (self.stats or {}).get(name)
        return None if isinstance(value, float) and math.isnan(value) else value

    def to_dict(self) -> dict[str, Any]:
        """All of it for a file, the steps as columns of equal length and NaN as None."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "steps"]
        values = {name: getattr(self, name) for name in names}
        columns = {name: [getattr(step, name) for step in self.steps] for name in STEP_FIELDS}
        for name in ("seconds", "processor_seconds", "loss"):
            columns[name] = [None if x is None else round(x, DIGITS) for x in columns[name]]
        found: dict[str, Any] = plain({**values, "steps": columns})
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunRecord:
        """The inverse of `to_dict`, from a file."""
        steps = [StepRecord(*row) for row in zip(*(values["steps"][name] for name in STEP_FIELDS))]
        after = {int(count): loss for count, loss in values["held_out_after"].items()}
        return cls(**{**values, "steps": steps, "held_out_after": after})


class RecordStore:
    """Finished runs in a file, found by what decides them.

    Args:
        path: The file, there or not.
        surroundings: What all runs depend on beside their keys, such as versions and data. Runs
            with others are kept, and not used.
    """

    def __init__(self, path: Path, surroundings: Mapping[str, Any]) -> None:
        self._store = RunStore(path, ("key", "surroundings"))
        self._surroundings = plain(surroundings)

    def get(self, key: Mapping[str, Any]) -> RunRecord | None:
        """Returns a run, or None if it is still to be done."""
        line = self._store.get(plain(key), self._surroundings)
        return RunRecord.from_dict(line["run"]) if line else None

    def add(self, key: Mapping[str, Any], run: RunRecord) -> RunRecord:
        """Keeps a run; returns it as it comes back from the file."""
        values = run.to_dict()
        self._store.add({"key": plain(key), "surroundings": self._surroundings, "run": values})
        return RunRecord.from_dict(values)
