"""The runs of a sweep: what each came to, and how a sweep that was stopped goes on."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_memory import release_memory
from line_files import append_line, parsed_lines
from run_records import BASELINE, HYBRID, RunRecord
from text_data import TokenizedText
from training_run import train
from tune_options import Settings, Sweep

STATISTICS = ("predicted_steps", "rollbacks", "acceptance_rate")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: "hybrid" or "baseline".
        seed: Its seed.
        learning_rate: Its learning rate.
        settings: What else was swept; None for AdamW.
    """

    name: str
    seed: int
    learning_rate: float
    settings: Settings | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain Python values."""
        return {
            "name": self.name,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "settings": None if self.settings is None else self.settings.to_dict(),
        }


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        held_out: Held-out loss at its end; infinite where it is not a number.
        seconds: Of training.
        gradients: How many it took.
        statistics: Some of what HybridOptimizer reports.
    """

    held_out: float
    seconds: float
    gradients: int
    statistics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain Python values."""
        return {
            "held_out": self.held_out,
            "seconds": self.seconds,
            "gradients": self.gradients,
            "statistics": self.statistics,
        }


def trials(sweep: Sweep) -> list[Trial]:
    """Returns every run of a sweep, seed by seed: the first seed shows everything once.

    Args:
        sweep: The sweep.
    """
    found = []
    for seed in sweep.seeds:
        found += [Trial(BASELINE, seed, rate) for rate in sweep.learning_rates]
        found += [
            Trial(HYBRID, seed, settings.learning_rate, settings) for settings in sweep.distinct
        ]
    return found


def run_trial(
    trial: Trial, sweep: Sweep, text: TokenizedText, report: Callable[[RunRecord], None]
) -> Outcome:
    """Trains once.

    Args:
        trial: Which run.
        sweep: Everything that is the same in all.
        text: What to train on.
        report: Called after every step.
    """
    config = None if trial.settings is None else trial.settings.config(sweep.base.hybrid)
    options = sweep.options(trial.learning_rate, config)
    record = RunRecord(trial.name, trial.seed, sweep.gradients, options.batch * options.length)
    train(record, options, text, report=report)
    release_memory()
    loss = record.held_out_end
    return Outcome(
        held_out=loss if loss is not None and math.isfinite(loss) else math.inf,
        seconds=record.seconds,
        gradients=record.gradients,
        statistics={
            name: record.statistic(name)
            for name in STATISTICS
            if record.statistic(name) is not None and not math.isnan(record.statistic(name))
        },
    )


class TrialStore:
    """The finished runs of a sweep, a line of a file for each.

    Args:
        path: The file, there or not.
        surroundings: What a result depends on beside its trial. Lines with another are kept,
            and not used.
    """

    def __init__(self, path: Path, surroundings: dict[str, Any]) -> None:
        self._path = path
        # As it comes back from the file: tuples are lists there.
        self._surroundings = json.loads(json.dumps(surroundings))
        self._found: dict[str, Outcome] = {}
        for _, _, line in parsed_lines(path):
            known = isinstance(line, dict) and {"trial", "outcome", "surroundings"} <= line.keys()
            if known and line["surroundings"] == self._surroundings:
                self._found[json.dumps(line["trial"])] = Outcome(**line["outcome"])

    def get(self, trial: Trial) -> Outcome | None:
        """Returns what a run came to, or None if it is still to be done."""
        return self._found.get(json.dumps(trial.to_dict()))

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Keeps what a run came to."""
        self._found[json.dumps(trial.to_dict())] = outcome
        line = {
            "trial": trial.to_dict(),
            "outcome": outcome.to_dict(),
            "surroundings": self._surroundings,
        }
        append_line(self._path, json.dumps(line))


@dataclass(frozen=True)
class Score:
    """What some settings came to over the tuning seeds.

    Attributes:
        learning_rate: The learning rate.
        settings: What else was swept; None for AdamW.
        losses: Held-out loss of each seed, in the order of the seeds.
        statistics: Means of what HybridOptimizer reports.
    """

    learning_rate: float
    settings: Settings | None
    losses: tuple[float, ...]
    statistics: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean held-out loss: what decides."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        if len(self.losses) < 2 or not math.isfinite(self.mean):
            return None
        return statistics.stdev(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for the JSON file."""
        return {
            "learning_rate": self.learning_rate,
            "settings": None if self.settings is None else self.settings.to_dict(),
            "held_out_mean": self.mean,
            "held_out_deviation": self.deviation,
            "held_out_by_seed": list(self.losses),
            "statistics": self.statistics,
        }


def scores(sweep: Sweep, store: TrialStore, name: str) -> list[Score]:
    """Returns what has a result from every seed, the best first.

    Args:
        sweep: The sweep.
        store: Its finished runs.
        name: "hybrid" or "baseline".
    """
    combinations: Sequence[tuple[float, Settings | None]]
    if name == BASELINE:
        combinations = [(rate, None) for rate in sweep.learning_rates]
    else:
        combinations = [(settings.learning_rate, settings) for settings in sweep.distinct]
    found = []
    for rate, settings in combinations:
        outcomes = [store.get(Trial(name, seed, rate, settings)) for seed in sweep.seeds]
        done = [outcome for outcome in outcomes if outcome is not None]
        if len(done) < len(outcomes):
            continue
        # The same number of gradients for all, or the losses could not be compared.
        if any(outcome.gradients != sweep.gradients for outcome in done):
            raise RuntimeError(
                f"a run of {rate, settings} did not take {sweep.gradients} gradients"
            )
        known = [key for key in STATISTICS if all(key in o.statistics for o in done)]
        means = {key: statistics.fmean(o.statistics[key] for o in done) for key in known}
        found.append(Score(rate, settings, tuple(o.held_out for o in done), means))
    return sorted(found, key=lambda score: score.mean)
