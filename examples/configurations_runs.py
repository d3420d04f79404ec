"""The runs of ``three_configurations.py``: one configuration from one seed, kept when finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configurations_options import CONFIGURATIONS, SIXTEEN_BIT_PARAMETERS, Plan
from host_memory import release_memory
from line_files import append_line, parsed_lines
from peak_memory import PeakMemory
from run_records import CONTROL, HYBRID, RunRecord
from text_data import TokenizedText
from training_run import train

STEP_FIELDS = ("phase", "seconds", "processor_seconds", "memory_bytes", "gradients", "loss")


class DivergedError(RuntimeError):
    """A run came to no loss that could be compared."""


@dataclass(frozen=True)
class ConfigurationRun:
    """What one configuration did from one seed.

    Attributes:
        configuration: One of `CONFIGURATIONS`.
        seed: Its seed.
        optimizer: Which optimizer exactly.
        device: Type of the device it ran on.
        tokens_per_batch: Tokens that a gradient evaluation consumes.
        steps: Columns of equal length, by the names of `STEP_FIELDS`. Memory is that of the
            device at the step's peak, or on a CPU the process's resident memory after the step.
        held_out_start: Held-out loss before the first step.
        held_out_end: Held-out loss after the last.
        memory_before: Memory in use before the model was built, in bytes.
        memory_peak: Most memory in use in the timed steps, in bytes.
        parameter_bytes: Of the model.
        state_bytes_device: Of the optimizer's state on the model's device.
        state_bytes_host: Of the optimizer's state in host memory, away from the device.
        stats: What HybridOptimizer reports.
    """

    configuration: str
    seed: int
    optimizer: str
    device: str
    tokens_per_batch: int
    steps: dict[str, list[Any]]
    held_out_start: float
    held_out_end: float
    memory_before: int
    memory_peak: int
    parameter_bytes: int
    state_bytes_device: int
    state_bytes_host: int
    stats: dict[str, Any] | None

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return math.fsum(self.steps["seconds"])

    @property
    def processor_seconds(self) -> float:
        """Processor time of all steps, which other work on the machine hardly touches."""
        return math.fsum(self.steps["processor_seconds"])

    @property
    def gradients(self) -> int:
        """Gradient evaluations; a window of micro-batches is one."""
        return int(self.steps["gradients"][-1])

    @property
    def losses(self) -> list[float]:
        """Training loss at each gradient evaluation."""
        return [loss for loss in self.steps["loss"] if loss is not None]

    @property
    def tokens_per_second(self) -> float:
        """Consumed tokens for each second; predicted steps consume none."""
        return self.gradients * self.tokens_per_batch / self.seconds

    @property
    def kept_bytes(self) -> int:
        """Parameters, their gradients and the optimizer's state on the device, in bytes.

        On a CPU what is offloaded lies in the same memory, so nothing is saved by it.
        """
        elsewhere = 0 if self.device == "cuda" else self.state_bytes_host
        return 2 * self.parameter_bytes + self.state_bytes_device + elsewhere

    def of_phase(self, phase: str) -> list[float]:
        """Returns the times of the steps of one phase."""
        pairs = zip(self.steps["phase"], self.steps["seconds"], strict=True)
        return [seconds for name, seconds in pairs if name == phase]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain Python values that JSON has words for."""
        return {
            "configuration": self.configuration,
            "seed": self.seed,
            "optimizer": self.optimizer,
            "device": self.device,
            "tokens_per_batch": self.tokens_per_batch,
            "held_out_start": self.held_out_start,
            "held_out_end": self.held_out_end,
            "memory_before": self.memory_before,
            "memory_peak": self.memory_peak,
            "parameter_bytes": self.parameter_bytes,
            "state_bytes_device": self.state_bytes_device,
            "state_bytes_host": self.state_bytes_host,
            "stats": _strict(self.stats),
            "steps": self.steps,
        }


def _strict(stats: dict[str, Any] | None) -> dict[str, Any] | None:
    """Turns NaN, such as the acceptance rate of nothing, into None: JSON has no word for it."""
    if stats is None:
        return None
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in stats.items()
    }


def order(index: int) -> list[str]:
    """Returns the order in which a seed's configurations run.

    It rotates from seed to seed, so that none of them always runs first; the control, which
    needs to know how many gradients HybridOptimizer used, is always last.

    Args:
        index: The place of the seed among the seeds, from 0.
    """
    first = [name for name in CONFIGURATIONS if name != CONTROL]
    start = index % len(first)
    return [*first[start:], *first[:start], CONTROL]


def run_configuration(
    configuration: str,
    seed: int,
    steps: int,
    plan: Plan,
    text: TokenizedText,
    report: Callable[[RunRecord], None] = lambda record: None,
) -> ConfigurationRun:
    """Trains once.

    Args:
        configuration: One of `CONFIGURATIONS`.
        seed: Seed of the initial weights and of the batches.
        steps: Calls of ``step()``; the learning rate's schedule ends with them.
        plan: Everything else.
        text: What to train on.
        report: Called after every step.

    Raises:
        DivergedError: The loss at the end is not a finite number.
    """
    options = plan.options(configuration)
    memory = PeakMemory(options.device)
    memory_bytes: list[int] = []

    def after_step(record: RunRecord) -> None:
        if options.device.type == "cuda":
            memory_bytes.append(torch.cuda.max_memory_allocated(options.device))
        else:
            memory_bytes.append(memory.used())
        report(record)

    record = RunRecord(
        HYBRID if configuration in SIXTEEN_BIT_PARAMETERS else configuration,
        seed,
        steps,
        options.batch * options.length,
    )
    try:
        train(
            record,
            options,
            text,
            report=after_step,
            micro_batches=plan.micro_batches(configuration),
            loss_scale=plan.loss_scale_of(configuration),
        )
    finally:
        release_memory()
    start, end = record.held_out_start, record.held_out_end
    if start is None or end is None or not math.isfinite(end):
        raise DivergedError(
            f"{configuration}, seed {seed}: the held-out loss after {steps} steps is {end}, not a "
            "finite number; a lower --lr may help"
        )
    return ConfigurationRun(
        configuration=configuration,
        seed=seed,
        optimizer=record.optimizer,
        device=options.device.type,
        tokens_per_batch=record.tokens_per_batch,
        steps={
            "phase": [step.phase for step in record.steps],
            "seconds": [round(step.seconds, 6) for step in record.steps],
            "processor_seconds": [round(seconds, 6) for seconds in record.processor_seconds],
            "memory_bytes": memory_bytes,
            "gradients": [step.gradients for step in record.steps],
            "loss": [None if x.loss is None else round(x.loss, 6) for x in record.steps],
        },
        held_out_start=start,
        held_out_end=end,
        memory_before=record.memory_before,
        memory_peak=record.memory_peak,
        parameter_bytes=record.parameter_bytes,
        state_bytes_device=record.state_bytes_device,
        state_bytes_host=record.state_bytes_host,
        stats=record.stats,
    )


class RunStore:
    """The finished runs, a line of a file for each.

    Args:
        path: The file, there or not.
        surroundings: Hardware, versions and data: what a result depends on beside its settings.
            Lines with others are kept, and not used.
    """

    def __init__(self, path: Path, surroundings: dict[str, Any]) -> None:
        self._path = path
        self._surroundings = surroundings
        self._found: dict[str, ConfigurationRun] = {}
        for _, _, line in parsed_lines(path):
            if isinstance(line, dict) and {"key", "run"} <= line.keys():
                self._found[_text(line["key"])] = ConfigurationRun(**line["run"])

    def key(self, plan: Plan, configuration: str, seed: int, steps: int) -> dict[str, Any]:
        """Returns everything that a run depends on.

        Args:
            plan: The settings.
            configuration: One of `CONFIGURATIONS`.
            seed: Its seed.
            steps: Its steps.
        """
        return {
            "configuration": configuration,
            "seed": seed,
            **plan.settings(configuration),
            "steps": steps,
            "surroundings": self._surroundings,
        }

    def get(self, key: dict[str, Any]) -> ConfigurationRun | None:
        """Returns a finished run, or None if it is still to be done."""
        return self._found.get(_text(key))

    def add(self, key: dict[str, Any], run: ConfigurationRun) -> None:
        """Keeps a finished run."""
        self._found[_text(key)] = run
        append_line(self._path, _text({"key": key, "run": run.to_dict()}))


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
