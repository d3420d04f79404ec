"""The flags of ``tune.py``: its own, and those of ``gpt2_small.py`` that it hands on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flag_types import real_number, refuse_flags, whole_number
from gpt2_options import LARGEST_SEED, MODEL_SHAPES, Options
from gpt2_options import parse_options as parse_gpt2_options
from run_records import MUON

from triton_hybrid import HybridConfig

AXES = ("confidence_threshold", "max_predict_steps", "correction_interval", "learning_rate")
REDUCTIONS = ("min", "mean")
FORBIDDEN = {
    "--lr": "it is swept: --learning-rates",
    "--confidence-threshold": "it is swept: --confidence-thresholds",
    "--max-predict-steps": "it is swept: --horizons",
    "--correction-interval": "it is swept: --correction-intervals",
    "--steps": "--gradients",
    "--seed": "--seeds",
    "--drive": "the sweep is inline, so that every run takes equally many gradients",
    "--only": "AdamW is always run beside",
    "--controls": "AdamW is always run for as many gradients",
}

DESCRIPTION = """\
Looks for the best learning rate and settings of HybridOptimizer: trains GPT-2 with every
combination of the given values from every given seed, on the data and with the loss of
gpt2_small.py, each for the same number of gradient evaluations, in the inline drive. Beside it
torch.optim.AdamW is trained with every learning rate for as many gradients. The lowest mean
held-out loss over the seeds wins. Seeds that chose the settings say too much good about them:
report results on other seeds.
"""

EPILOG = """\
What is not listed here is as in gpt2_small.py and may be given: --batch, --length, --schedule,
--base, --predictor, --device, --precision, --threads, --data, --full-steps and so on
(gpt2_small.py --help). Runs that are finished are kept in the output folder; the same command
again goes on from there.
"""


@dataclass(frozen=True, order=True)
class Settings:
    """What is swept.

    Attributes:
        learning_rate: The (first) learning rate.
        confidence_threshold: Of HybridConfig.
        max_predict_steps: Of HybridConfig; the source calls it the horizon.
        correction_interval: Of HybridConfig.
    """

    learning_rate: float
    confidence_threshold: float
    max_predict_steps: int
    correction_interval: int

    @property
    def canonical(self) -> Settings:
        """The same run, said in one way: a row of predictions ends with its stretch."""
        row = min(self.correction_interval, self.max_predict_steps)
        return dataclasses.replace(self, correction_interval=row)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return dataclasses.asdict(self)

    def config(self, rest: HybridConfig) -> HybridConfig:
        """The configuration with these settings.

        Args:
            rest: Everything that is not swept.
        """
        values = self.to_dict()
        del values["learning_rate"]
        return dataclasses.replace(rest, **values)


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep depends on.

    Attributes:
        learning_rates: Their values, and so on.
        confidence_thresholds: Of HybridConfig.
        horizons: Values of max_predict_steps.
        correction_intervals: Of HybridConfig.
        seeds: The tuning seeds.
        axes: The heat map's horizontal and vertical axis.
        over: "min" or "mean": what the heat map shows of the settings that are no axis.
        muon_follows: Whether Muon's learning rate is the swept one.
        handed_on: Flags of gpt2_small.py as they were given.
        base: The flags of gpt2_small.py, without what is swept; its steps are the gradients.
    """

    learning_rates: tuple[float, ...]
    confidence_thresholds: tuple[float, ...]
    horizons: tuple[int, ...]
    correction_intervals: tuple[int, ...]
    seeds: tuple[int, ...]
    axes: tuple[str, str]
    over: str
    muon_follows: bool
    handed_on: tuple[str, ...]
    base: Options

    @property
    def gradients(self) -> int:
        """Gradient evaluations of every run."""
        return self.base.steps

    @property
    def grid(self) -> list[Settings]:
        """Every combination of the values."""
        return [
            Settings(rate, threshold, horizon, interval)
            for rate in self.learning_rates
            for threshold in self.confidence_thresholds
            for horizon in self.horizons
            for interval in self.correction_intervals
        ]

    @property
    def distinct(self) -> list[Settings]:
        """The combinations that are runs of their own."""
        return list(dict.fromkeys(settings.canonical for settings in self.grid))

    def values(self, axis: str) -> tuple[Any, ...]:
        """Returns the values of one axis, in order.

        Args:
            axis: One of `AXES`.
        """
        found: dict[str, tuple[Any, ...]] = {
            "learning_rate": self.learning_rates,
            "confidence_threshold": self.confidence_thresholds,
            "max_predict_steps": self.horizons,
            "correction_interval": self.correction_intervals,
        }
        return tuple(sorted(found[axis]))

    def options(self, learning_rate: float, config: HybridConfig | None = None) -> Options:
        """Returns the flags of one run.

        Args:
            learning_rate: Its learning rate.
            config: Its phase machine; None for AdamW.
        """
        base = self.base
        return dataclasses.replace(
            base,
            learning_rate=learning_rate,
            muon_learning_rate=learning_rate if self.muon_follows else base.muon_learning_rate,
            hybrid=config or base.hybrid,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["base"] = self.fixed
        return {**values, "gradients": self.gradients}

    @property
    def fixed(self) -> dict[str, Any]:
        """What no run changes."""
        base = self.base.to_dict()
        for swept in ("learning_rate", "seeds", "only", "controls"):
            del base[swept]
        if self.muon_follows:
            del base["muon_learning_rate"]
        base["hybrid"] = {name: value for name, value in base["hybrid"].items() if name not in AXES}
        return base


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags that are not those of gpt2_small.py."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(flag: str, default: Any, meaning: str, **more: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(flag, default=default, help=f"{meaning} (default: {shown})", **more)

    def values(flag: str, kind: Any, default: list[Any], meaning: str) -> None:
        add(flag, default, meaning, type=kind, nargs="+", metavar="VALUE")

    add("--model", "tiny", "size of GPT-2", choices=tuple(MODEL_SHAPES))
    add("--gradients", 40, "gradient evaluations of every run", type=whole_number(1))
    values("--learning-rates", real_number(0, open_below=True), [6e-4, 2e-3, 6e-3], "to try")
    values("--confidence-thresholds", real_number(0), [0.3, 0.7], "to try")
    values("--horizons", whole_number(1), [2, 5], "values of max_predict_steps to try")
    values("--correction-intervals", whole_number(1), [1, 2], "to try")
    values("--seeds", whole_number(0, LARGEST_SEED), [100, 101], "tuning seeds")
    add(
        "--heat-map",
        ["max_predict_steps", "learning_rate"],
        "horizontal and vertical axis of the heat map",
        nargs=2,
        choices=AXES,
        metavar="AXIS",
    )
    add(
        "--over",
        "min",
        "what the heat map shows of the settings that are no axis: the best of them, or the mean",
        choices=REDUCTIONS,
    )
    parser.add_argument(
        "--output", type=Path, help="folder for results; default: ./runs/tune_MODEL"
    )
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> Sweep:
    """Reads the command line; a bad flag ends the program with a message that names it.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        What to sweep.
    """
    parser = build_parser()
    given = sys.argv[1:] if arguments is None else arguments
    values, rest = parser.parse_known_args(given)
    flags = refuse_flags(parser, rest, FORBIDDEN)
    for flag in ("learning_rates", "confidence_thresholds", "horizons", "correction_intervals",
                 "seeds", "heat_map"):  # fmt: skip
        listed = getattr(values, flag)
        if len(set(listed)) < len(listed):
            name = flag.replace("_", "-")
            parser.error(f"argument --{name}: {listed} has one twice; allowed: each once")
    output = values.output or Path("runs") / f"tune_{values.model}"
    # What gpt2_small.py checks is not checked again here.
    base = parse_gpt2_options(
        ["--model", values.model, "--steps", str(values.gradients), "--drive", "inline",
         "--seeds", *map(str, values.seeds), "--output", str(output), *rest]
    )  # fmt: skip
    sweep = Sweep(
        learning_rates=tuple(values.learning_rates),
        confidence_thresholds=tuple(values.confidence_thresholds),
        horizons=tuple(values.horizons),
        correction_intervals=tuple(values.correction_intervals),
        seeds=tuple(values.seeds),
        axes=(values.heat_map[0], values.heat_map[1]),
        over=values.over,
        muon_follows=base.base == MUON and "--muon-lr" not in flags,
        handed_on=tuple(rest),
        base=base,
    )
    try:
        for settings in sweep.grid:
            settings.config(base.hybrid)
    except ValueError as error:
        parser.error(f"a value to try is not possible: {error}")
    return sweep
