"""A sweep over settings of HybridOptimizer: what it tries, its runs, and their scores."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from lib.flags import choice, real_number, several_seeds, whole_number
from lib.gpt2_options import COUNT, MODELS, QUICK, Options, RuleFlags, flag_name, phase_machine
from lib.gpt2_records import BASELINE, HYBRID, MUON, RecordStore, RunRecord
from triton_hybrid import HybridConfig

HYBRID_AXES = ("confidence_threshold", "max_predict_steps", "correction_interval")
AXES = (*HYBRID_AXES, "learning_rate")
STATISTICS = ("predicted_steps", "rollbacks", "acceptance_rate")
RATES, SHARES = real_number(0, above=True, many=True), real_number(0, many=True)
COUNTS = whole_number(1, many=True)


@dataclass(frozen=True, kw_only=True)
class SweepFlags(RuleFlags):
    """The flags of a sweep.

    Attributes:
        gradients: Gradient evaluations of every run.
        learning_rates: To try.
        confidence_thresholds: To try.
        horizons: Values of max_predict_steps to try.
        correction_intervals: To try.
        seeds: Tuning seeds.
        heat_map: Horizontal and vertical axis of the heat map.
        over: What the heat map shows of the settings that are no axis: the best of them, or the
            mean.
    """

    model: Annotated[str, MODELS] = "tiny"
    output: Path = Path("runs/tune_MODEL")
    hybrid: Annotated[HybridConfig, phase_machine(*HYBRID_AXES)] = QUICK
    gradients: Annotated[int, COUNT] = 40
    learning_rates: Annotated[tuple[float, ...], RATES] = (6e-4, 2e-3, 6e-3)
    confidence_thresholds: Annotated[tuple[float, ...], SHARES] = (0.3, 0.7)
    horizons: Annotated[tuple[int, ...], COUNTS] = (2, 5)
    correction_intervals: Annotated[tuple[int, ...], COUNTS] = (1, 2)
    seeds: Annotated[tuple[int, ...], several_seeds()] = (100, 101)
    heat_map: Annotated[tuple[str, ...], choice(AXES, many=True)] = (
        "max_predict_steps",
        "learning_rate",
    )
    over: Literal["min", "mean"] = "min"


@dataclass(frozen=True)
class Settings:
    """What is swept; all but the learning rate are fields of HybridConfig."""

    learning_rate: float
    confidence_threshold: float
    max_predict_steps: int
    correction_interval: int

    @property
    def canonical(self) -> Settings:
        """The same run, said in one way: a row of predictions ends with its stretch."""
        row = min(self.correction_interval, self.max_predict_steps)
        return replace(self, correction_interval=row)

    @property
    def hybrid(self) -> dict[str, Any]:
        """Those that are fields of HybridConfig."""
        return {name: getattr(self, name) for name in HYBRID_AXES}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: AdamW's has no settings beside the learning rate."""

    name: str
    seed: int
    learning_rate: float
    settings: Settings | None = None


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep depends on.

    Attributes:
        flags: The flags.
        base: Options of every run, without what is swept; their steps are the gradients.
    """

    flags: SweepFlags
    base: Options

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """The values to try, by the names of `Settings`."""
        return {
            "learning_rate": self.flags.learning_rates,
            "confidence_threshold": self.flags.confidence_thresholds,
            "max_predict_steps": self.flags.horizons,
            "correction_interval": self.flags.correction_intervals,
        }

    @property
    def grid(self) -> list[Settings]:
        """Every combination of the values."""
        return [Settings(*values) for values in itertools.product(*self.values.values())]

    @property
    def distinct(self) -> list[Settings]:
        """The combinations that are runs of their own."""
        return list(dict.fromkeys(settings.canonical for settings in self.grid))

    @property
    def trials(self) -> list[Trial]:
        """Every run, seed by seed: the first seed shows everything once."""
        found = []
        for seed in self.flags.seeds:
            found += [Trial(BASELINE, seed, rate) for rate in self.flags.learning_rates]
            found += [Trial(HYBRID, seed, one.learning_rate, one) for one in self.distinct]
        return found

    @property
    def muon_follows(self) -> bool:
        """Whether Muon's learning rate is the swept one."""
        return self.flags.base == MUON and self.flags.muon_learning_rate is None

    @property
    def fixed(self) -> dict[str, Any]:
        """What no run changes."""
        base = self.base.to_dict()
        del base["learning_rate"]
        if self.muon_follows:
            del base["muon_learning_rate"]
        base["hybrid"] = {name: value for name, value in base["hybrid"].items() if name not in AXES}
        return base

    @property
    def handed_on(self) -> list[str]:
        """Flags of gpt2_small.py for what is not swept and not its default."""
        given: list[str] = []
        names = {field.name for field in fields(RuleFlags)} - {"hybrid", "output", "model"}
        flags, machine = self.flags, self.flags.hybrid
        changed = {name: getattr(flags, name) for name in vars(flags) if name in names}
        defaults = {**vars(type(flags)()), **vars(QUICK)}
        for name, value in {**changed, **vars(machine)}.items():
            if value != defaults[name]:
                given += [flag_name(name), *map(str, value if name == "data" else [value])]
        return given

    def options(self, trial: Trial) -> Options:
        """Returns the options of one run."""
        base, rate, settings = self.base, trial.learning_rate, trial.settings
        return replace(
            base,
            learning_rate=rate,
            muon_learning_rate=rate if self.muon_follows else base.muon_learning_rate,
            hybrid=replace(base.hybrid, **(settings.hybrid if settings else {})),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        flags = self.flags
        own = {name: value for name, value in vars(flags).items() if not hasattr(self.base, name)}
        return {**own, "muon_follows": self.muon_follows, "base": self.fixed}


@dataclass(frozen=True)
class Score:
    """What some settings came to over the tuning seeds.

    Attributes:
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
            "settings": self.settings and asdict(self.settings),
            "held_out_mean": self.mean,
            "held_out_deviation": self.deviation,
            "held_out_by_seed": list(self.losses),
            "statistics": self.statistics,
        }


def held_out(run: RunRecord) -> float:
    """Returns the held-out loss at the end of a run; infinite where it is not a number."""
    loss = run.held_out_end
    return loss if loss is not None and math.isfinite(loss) else math.inf


def known_statistics(run: RunRecord) -> dict[str, float]:
    """Returns some of what HybridOptimizer reports, as far as it is a number."""
    found = {name: run.statistic(name) for name in STATISTICS}
    return {name: value for name, value in found.items() if value is not None}


def outcomes(sweep: Sweep, store: RecordStore) -> list[dict[str, Any]]:
    """Returns what each finished run came to, for the JSON file."""
    return [
        {
            **asdict(trial),
            "held_out": held_out(run),
            "seconds": run.seconds,
            "gradients": run.gradients,
            "statistics": known_statistics(run),
        }
        for trial in sweep.trials
        if (run := store.get(asdict(trial)))
    ]


def scores(sweep: Sweep, store: RecordStore, name: str) -> list[Score]:
    """Returns the scores of "hybrid" or "baseline" with a run from every seed, the best first.

    Raises:
        RuntimeError: A run took another number of gradients: its loss cannot be compared.
    """
    found = []
    seeds, gradients = sweep.flags.seeds, sweep.flags.gradients
    for trial in sweep.trials:
        if trial.name != name or trial.seed != seeds[0]:
            continue
        runs = [run for seed in seeds if (run := store.get(asdict(replace(trial, seed=seed))))]
        if len(runs) < len(seeds):
            continue
        if any(run.gradients != gradients for run in runs):
            raise RuntimeError(f"a run of {trial} did not take {gradients} gradients")
        each: Sequence[dict[str, float]] = [known_statistics(run) for run in runs]
        known = [key for key in STATISTICS if all(key in one for one in each)]
        means = {key: statistics.fmean(one[key] for one in each) for key in known}
        losses = tuple(map(held_out, runs))
        found.append(Score(trial.learning_rate, trial.settings, losses, means))
    return sorted(found, key=lambda score: score.mean)
