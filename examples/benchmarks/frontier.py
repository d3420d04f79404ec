"""Measures optimizers against the frontier of tuned AdamW.

    python examples/benchmarks/frontier.py run --tasks lm --optimizers adamw hybrid \
        --lrs 1e-3 2e-3 4e-3 8e-3 --budgets 250 500 1000 --seeds 0 1 2 --output runs.jsonl
    python examples/benchmarks/frontier.py report runs.jsonl --output report
    python examples/benchmarks/frontier.py --quick

`run` trains every combination of tasks, optimizers, learning rates, budgets and seeds that the
file does not hold yet. With ``--tune-seeds`` all learning rates run on those seeds, and only the
best of them, for each task, optimizer and budget, on ``--seeds``. `report` turns files of runs
into a table, plots and a summary. ``--quick`` does both on a small task within a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from flag_types import real_number, whole_number
from frontier_optimizers import OPTIMIZERS, SCHEDULES, find_optimizer
from frontier_runs import RunSpec, read_lines, run_all
from frontier_tasks import TASKS

QUICK_TASK = "digits-fullbatch"
QUICK_OPTIONS = {"width": 64}
QUICK_RATES = (2e-2, 4e-2, 8e-2, 1.6e-1)
QUICK_SEEDS = (0, 1, 2, 3, 4, 5)
QUICK_BUDGETS = (40, 80, 160)
QUICK_MIDDLE = 80
QUICK_CONTENDERS = ("adamw-x1.5", "adamw-again", "hybrid")
QUICK_WORKERS = 2


@dataclass(frozen=True)
class Grid:
    """Runs to be made: all combinations.

    Attributes:
        tasks: Names and options of tasks.
        optimizers: Names and options of optimizers.
        lrs: Learning rates; None for the grid of task and optimizer.
        budgets: Gradient evaluations.
        schedule: Of the learning rate.
    """

    tasks: Mapping[str, dict[str, Any]]
    optimizers: Mapping[str, dict[str, Any]]
    lrs: Sequence[float] | None
    budgets: Sequence[int]
    schedule: str = "linear"

    def cells(self) -> Iterable[tuple[str, str, int]]:
        """Returns what is tuned by itself: task, optimizer and budget."""
        return itertools.product(self.tasks, self.optimizers, self.budgets)

    def rates(self, task: str, optimizer: str) -> Sequence[float]:
        """Returns the learning rates to try."""
        return self.lrs or find_optimizer(optimizer).grid(TASKS[task].learning_rates)

    def spec(self, cell: tuple[str, str, int], lr: float, seed: int) -> RunSpec:
        """Returns one run."""
        task, optimizer, budget = cell
        return RunSpec(
            task=task,
            optimizer=optimizer,
            lr=lr,
            budget=budget,
            seed=seed,
            schedule=self.schedule,
            task_options=self.tasks[task],
            optimizer_options=self.optimizers[optimizer],
        )

    def specs(self, seeds: Sequence[int]) -> list[RunSpec]:
        """Returns the runs at all learning rates."""
        return [
            self.spec(cell, lr, seed)
            for cell in self.cells()
            for lr in self.rates(cell[0], cell[1])
            for seed in seeds
        ]

    def best_specs(
        self, path: Path, tune_seeds: Sequence[int], seeds: Sequence[int]
    ) -> list[RunSpec]:
        """Returns the runs at the learning rate that was best on the tuning seeds."""
        finals = {line["key"]: line["final"] for line in read_lines(path)}
        specs = []
        for cell in self.cells():
            rates = sorted(self.rates(cell[0], cell[1]))
            mean = {
                lr: sum(_loss(finals[self.spec(cell, lr, seed).key]) for seed in tune_seeds)
                for lr in rates
            }
            best = min(rates, key=lambda lr: mean[lr])
            name = f"{cell[0]} {cell[1]} budget {cell[2]}"
            if math.isinf(mean[best]):
                print(f"{name}: diverged at every learning rate", file=sys.stderr)
                continue
            if len(rates) > 1 and best in (rates[0], rates[-1]):
                print(f"{name}: the best rate, {best:g}, is at the grid's edge", file=sys.stderr)
            specs += [self.spec(cell, best, seed) for seed in seeds]
        return specs


def _loss(final: float | None) -> float:
    return math.inf if final is None else final


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="frontier.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small frontier, within a minute")
    parser.add_argument(
        "--output", type=Path, help="folder of the quick frontier (default: a temporary one)"
    )
    commands = parser.add_subparsers(dest="command", metavar="{run,report}")

    run = commands.add_parser("run", help="train what a file of runs does not hold yet")
    run.add_argument("--tasks", nargs="+", required=True, choices=sorted(TASKS), metavar="TASK",
                     help=f"of {', '.join(TASKS)}")  # fmt: skip
    run.add_argument("--optimizers", nargs="+", required=True, choices=sorted(OPTIMIZERS),
                     metavar="OPTIMIZER", help=f"of {', '.join(OPTIMIZERS)}")  # fmt: skip
    run.add_argument("--lrs", nargs="+", type=real_number(0, open_below=True), metavar="LR",
                     help="peak learning rates (default: a grid for each)")  # fmt: skip
    run.add_argument("--budgets", nargs="+", required=True, type=whole_number(1), metavar="N",
                     help="gradient evaluations")  # fmt: skip
    run.add_argument("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2], metavar="N",
                     help="of weights and data order (default: 0 1 2)")  # fmt: skip
    run.add_argument("--tune-seeds", nargs="+", type=whole_number(0), metavar="N",
                     help="all learning rates on these, the best one on --seeds")  # fmt: skip
    run.add_argument("--schedule", choices=SCHEDULES, default="linear")
    run.add_argument("--task-option", action="append", default=[], metavar="[TASK:]NAME=VALUE",
                     help="for all tasks, or for the one named")  # fmt: skip
    run.add_argument("--optimizer-option", action="append", default=[],
                     metavar="[OPTIMIZER:]NAME=VALUE",
                     help="for all optimizers, or for the one named")  # fmt: skip
    run.add_argument("--output", type=Path, required=True, metavar="FILE", dest="file",
                     help="file of runs, one JSON object a line; it is continued")  # fmt: skip
    run.add_argument("--workers", type=whole_number(1), default=1, help="runs at a time")
    run.add_argument("--threads", type=whole_number(1), default=1, help="threads of each run")

    report = commands.add_parser("report", help="table, plots and summary of files of runs")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report.add_argument("--output", type=Path, required=True, metavar="FOLDER", dest="folder")
    return parser


def parse_options(
    flag: str, texts: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the options of each name, from texts such as ``batch=4`` and ``lm:batch=4``.

    Raises:
        ValueError: A text of another form, or for a name that is not among the names.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        left, equals, value = text.partition("=")
        owner, colon, option = left.rpartition(":")
        if not equals or not option:
            raise ValueError(f"{flag} {text!r}: must be NAME=VALUE or OWNER:NAME=VALUE")
        if colon and owner not in options:
            raise ValueError(f"{flag} {text!r}: {owner!r} must be one of {sorted(options)}")
        for name in [owner] if colon else names:
            options[name][option] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def run_command(arguments: argparse.Namespace) -> None:
    """Trains what the file does not hold yet."""
    grid = Grid(
        tasks=parse_options("--task-option", arguments.task_option, arguments.tasks),
        optimizers=parse_options(
            "--optimizer-option", arguments.optimizer_option, arguments.optimizers
        ),
        lrs=arguments.lrs,
        budgets=arguments.budgets,
        schedule=arguments.schedule,
    )

    def run(specs: list[RunSpec]) -> int:
        return run_all(specs, arguments.file, arguments.workers, arguments.threads)

    if arguments.tune_seeds is None:
        added = run(grid.specs(arguments.seeds))
    else:
        added = run(grid.specs(arguments.tune_seeds))
        added += run(grid.best_specs(arguments.file, arguments.tune_seeds, arguments.seeds))
    print(f"{added} runs added to {arguments.file}", file=sys.stderr)


def report_command(files: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Writes the report of files of runs.

    Raises:
        ValueError: A file does not exist, or there is no run in any.
    """
    from frontier_report import load_lines, write_report

    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: does not exist; must be a file of runs")
    summary: dict[str, Any] = write_report(load_lines(files), folder)
    return summary


def quick_specs() -> list[RunSpec]:
    """Returns the runs of the quick frontier."""
    tasks = {QUICK_TASK: dict(QUICK_OPTIONS)}
    baseline = Grid(tasks, {"adamw": {}}, QUICK_RATES, QUICK_BUDGETS)
    contenders = Grid(tasks, {name: {} for name in QUICK_CONTENDERS}, QUICK_RATES, [QUICK_MIDDLE])
    return baseline.specs(QUICK_SEEDS) + contenders.specs(QUICK_SEEDS)


def quick(folder: Path | None) -> dict[str, Any]:
    """Makes the quick frontier from scratch, and its report."""
    folder = folder or Path(tempfile.mkdtemp(prefix="frontier-quick-"))
    file = folder / "quick.jsonl"
    file.unlink(missing_ok=True)
    run_all(quick_specs(), file, workers=QUICK_WORKERS)
    summary = report_command([file], folder)
    print(f"Report in {folder}")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.quick == (parsed.command is not None):
        parser.error("give one of: run, report, --quick")
    try:
        if parsed.quick:
            quick(parsed.output)
        elif parsed.command == "run":
            run_command(parsed)
        else:
            report_command(parsed.files, parsed.folder)
    except (ValueError, RuntimeError) as error:
        print(f"frontier.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
