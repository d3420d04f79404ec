"""What a training run did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BASELINE, HYBRID, CONTROL, ALONE = "baseline", "hybrid", "control", "base_alone"
NAMES = {BASELINE: "AdamW", HYBRID: "HybridOptimizer", CONTROL: "AdamW, as many gradients"}
ADAMW, MUON = "adamw", "muon"
BASES = {ADAMW: "AdamW", MUON: "Muon"}
FINAL_LOSSES = 5  # the last few batches' mean: the loss of one batch is mostly the batch's own


@dataclass(frozen=True)
class StepRecord:
    """One call of ``step()``.

    Attributes:
        step: Which one, from 1.
        phase: The optimizer's phase, or "baseline".
        seconds: Wall-clock time of everything in the step, from batch to zeroed gradients.
        gradients: Gradient evaluations so far.
        loss: Training loss of the step's batch; None for a step without one.
    """

    step: int
    phase: str
    seconds: float
    gradients: int
    loss: float | None


@dataclass
class RunRecord:
    """What one run did, filled in while it runs.

    Attributes:
        name: "baseline", "hybrid", "control" or "base_alone".
        seed: Seed of the initial weights and of the batches.
        planned_steps: How many steps it was to take.
        tokens_per_batch: Tokens a gradient evaluation consumes.
        base: Base rule of hidden matrices, "adamw" or "muon"; all else is AdamW's.
        optimizer: Which optimizer exactly.
        steps: The steps taken.
        held_out_start: Held-out loss before the first step.
        held_out_end: Held-out loss after the last; None where it was not reached.
        held_out_after: Held-out loss after some numbers of gradient evaluations.
        memory_before: Memory in use before the model was built, in bytes.
        memory_peak: Most memory in use in the timed steps, in bytes.
        stats: What HybridOptimizer reports.
        processor_seconds: Processor time of each step, of all threads.
        parameter_bytes: Bytes of the model's parameters.
        state_bytes_device: Bytes of the optimizer's state on the model's device.
        state_bytes_host: Bytes of it in host memory, away from the device.
    """

    name: str
    seed: int
    planned_steps: int
    tokens_per_batch: int
    base: str = ADAMW
    optimizer: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    held_out_start: float | None = None
    held_out_end: float | None = None
    held_out_after: dict[int, float] = field(default_factory=dict)
    memory_before: int = 0
    memory_peak: int = 0
    stats: dict[str, Any] | None = None
    processor_seconds: list[float] = field(default_factory=list)
    parameter_bytes: int = 0
    state_bytes_device: int = 0
    state_bytes_host: int = 0

    @property
    def title(self) -> str:
        """What it is called where it is shown."""
        if self.name == ALONE:
            return f"{BASES[self.base]} alone"
        if self.base != ADAMW:
            return f"{NAMES[self.name]} on {BASES[self.base]}"
        return NAMES[self.name]

    @property
    def complete(self) -> bool:
        """Whether it took all its steps and its final loss is known."""
        return len(self.steps) == self.planned_steps and self.held_out_end is not None

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def gradients(self) -> int:
        """Gradient evaluations."""
        return self.steps[-1].gradients if self.steps else 0

    @property
    def tokens_per_second(self) -> float:
        """Consumed tokens for each second."""
        return self.gradients * self.tokens_per_batch / self.seconds if self.steps else 0.0

    @property
    def losses(self) -> list[float]:
        """Training loss at each gradient evaluation."""
        return [step.loss for step in self.steps if step.loss is not None]

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last few gradient evaluations."""
        last = self.losses[-FINAL_LOSSES:]
        return sum(last) / len(last) if last else None

    def stopped_after(self, gradients: int) -> RunRecord | None:
        """Returns this run as it stood after some gradients; None if it did not measure there."""
        if gradients not in self.held_out_after:
            return None
        return RunRecord(
            name=CONTROL,
            seed=self.seed,
            planned_steps=gradients,
            tokens_per_batch=self.tokens_per_batch,
            base=self.base,
            optimizer=self.optimizer,
            steps=[step for step in self.steps if step.gradients <= gradients],
            held_out_start=self.held_out_start,
            held_out_end=self.held_out_after[gradients],
            memory_before=self.memory_before,
            memory_peak=self.memory_peak,
        )

    def seconds_by_phase(self) -> dict[str, list[float]]:
        """Returns the times of the steps of each phase, phases in the order they came."""
        phases: dict[str, list[float]] = {}
        for step in self.steps:
            phases.setdefault(step.phase, []).append(step.seconds)
        return phases

    def statistic(self, name: str) -> Any:
        """Returns something HybridOptimizer reports, or None where there is no such thing."""
        return (self.stats or {}).get(name)


@dataclass
class SeedRecord:
    """All runs from one seed.

    Attributes:
        seed: The seed.
        baseline: AdamW for all steps.
        hybrid: HybridOptimizer.
        control: AdamW for as many gradients as HybridOptimizer used.
        control_source: Where the control comes from: "own run", "baseline on its way" or "none".
        alone: The base rule without prediction, for all steps; only where it is not AdamW.
    """

    seed: int
    baseline: RunRecord | None = None
    hybrid: RunRecord | None = None
    control: RunRecord | None = None
    control_source: str = "none"
    alone: RunRecord | None = None

    @property
    def runs(self) -> list[RunRecord]:
        """The runs there are, in the order of the tables."""
        runs = (self.baseline, self.alone, self.hybrid, self.control)
        return [run for run in runs if run is not None]

    @property
    def speed_up(self) -> float | None:
        """Wall-clock time of the baseline over that of HybridOptimizer, for all steps of both."""
        if not (self.baseline and self.hybrid and self.baseline.complete and self.hybrid.complete):
            return None
        return self.baseline.seconds / self.hybrid.seconds

    @property
    def against_baseline(self) -> float | None:
        """How much higher HybridOptimizer's final held-out loss is than AdamW's, in percent."""
        return percent_above(self.hybrid, self.baseline)

    @property
    def against_control(self) -> float | None:
        """The same against AdamW with as many gradients."""
        return percent_above(self.hybrid, self.control)

    @property
    def against_alone(self) -> float | None:
        """The same against the base rule without prediction."""
        return percent_above(self.hybrid, self.alone)

    @property
    def against_alone_on_its_way(self) -> float | None:
        """The same against the base rule after as many gradients, where that was measured."""
        if self.hybrid is None or self.alone is None:
            return None
        return percent_above(self.hybrid, self.alone.stopped_after(self.hybrid.gradients))


def percent_above(run: RunRecord | None, other: RunRecord | None) -> float | None:
    """Returns how much higher one run's final held-out loss is than another's, in percent."""
    if run is None or other is None or not run.held_out_end or not other.held_out_end:
        return None
    return 100 * (run.held_out_end / other.held_out_end - 1)
