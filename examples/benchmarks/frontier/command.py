r"""Measures optimizers against the frontier of tuned AdamW.

    python examples/benchmarks/frontier.py run --tasks lm --optimizers adamw hybrid \
        --lrs 1e-3 2e-3 4e-3 8e-3 --budgets 250 500 1000 --seeds 0 1 2 --output runs.jsonl
    python examples/benchmarks/frontier.py report runs.jsonl --output report
    python examples/benchmarks/frontier.py never-worse --seeds 0 1 2 3 --output report
    python examples/benchmarks/frontier.py cost --tasks lm --optimizers adamw hybrid --output FILE
    python examples/benchmarks/frontier.py again runs.jsonl --optimizers hybrid --output new.jsonl
    python examples/benchmarks/frontier.py --quick [--output report]

`run` trains every combination of tasks, optimizers, learning rates, budgets and seeds that the
file does not hold yet. With ``--tune-seeds`` all learning rates run on those seeds, and only the
best of them, for each task, optimizer and budget, on ``--seeds``. `report` turns files of runs
into a table, plots and a summary; `pairs` compares one optimizer with others at the same budget,
with no frontier of AdamW. ``--quick`` does both on a small task within a minute.
`never-worse` asks another question: whether HybridOptimizer with its defaults, put in AdamW's place
at the same learning rate, is worse. `cost` measures what a gradient and its step take of the
processor. `again` makes recorded runs once more with the code of today, and compares their losses.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from frontier.again import run_again, select
from frontier.cost import measure_cost
from frontier.drivers import SCHEDULES
from frontier.judge import tune
from frontier.never_worse import measure_never_worse
from frontier.optimizers import OPTIMIZERS, find_optimizer
from frontier.pairs import write_pairs
from frontier.report import load_lines, write_report
from frontier.runs import run_all
from frontier.swap_tasks import SWAP_TASKS
from frontier.tasks import TASKS
from frontier.training import RunSpec
from lib.flags import INTERRUPTED, REFUSED, choice, parse, real_number, whole_number
from lib.run_store import RunStore

NAME = "frontier.py"
QUICK_TASKS = {"digits-fullbatch": {"width": 64}}
QUICK_RATES = (2e-2, 4e-2, 8e-2, 1.6e-1)
QUICK_SEEDS = (0, 1, 2, 3, 4, 5)
QUICK_WORKERS = 2

Count = Annotated[int, whole_number(1)]
Counts = Annotated[tuple[int, ...], whole_number(1, many=True)]
Seeds = Annotated[tuple[int, ...], whole_number(0, many=True)]
Rates = Annotated[tuple[float, ...] | None, real_number(0, above=True, many=True)]
Tasks = Annotated[tuple[str, ...], choice(list(TASKS), many=True)]
Optimizers = Annotated[tuple[str, ...], choice(list(OPTIMIZERS), many=True)]
Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="[OWNER:]NAME=VALUE")]
Folder = Annotated[Path, arg(metavar="FOLDER")]
File = Annotated[Path, arg(metavar="FILE")]


@dataclass(frozen=True)
class RunOptions:
    """Train what a file of runs does not hold yet."""

    tasks: Tasks
    optimizers: Optimizers
    budgets: Counts  # gradient evaluations
    output: File  # file of runs as JSON lines; it is continued
    lrs: Rates = None  # at the peak (None: a grid for each task and optimizer)
    seeds: Seeds = (0, 1, 2)  # of weights and data order
    tune_seeds: Seeds = ()  # all learning rates on these, the best one on --seeds
    schedule: Annotated[str, choice(SCHEDULES)] = "linear"  # of the learning rate
    task_option: Settings = ()  # for all tasks, or for the one named
    optimizer_option: Settings = ()  # for all optimizers, or for the one named
    workers: Count = 1  # runs at a time
    threads: Count = 1  # of each run


@dataclass(frozen=True)
class ReportOptions:
    """Write table, plots and summary of files of runs."""

    files: Positional[tuple[Path, ...]]
    output: Folder  # where the report goes


@dataclass(frozen=True)
class PairsOptions:
    """Compare one optimizer's final losses with all others', seed by seed."""

    files: Positional[tuple[Path, ...]]
    optimizer: Annotated[str, choice(list(OPTIMIZERS))]  # which one
    output: File  # JSON


@dataclass(frozen=True)
class NeverWorseOptions:
    """Compare HybridOptimizer's defaults with AdamW's at one learning rate."""

    output: Folder  # where the report goes
    tasks: Annotated[tuple[str, ...], choice(list(SWAP_TASKS), many=True)] = tuple(SWAP_TASKS)
    seeds: Seeds = (0, 1, 2, 3)  # of weights and data
    steps: Count | None = None  # gradient evaluations of every run (None: the task's own)


@dataclass(frozen=True)
class CostOptions:
    """Measure the processor time of a gradient with its step, optimizers in turn."""

    tasks: Tasks
    optimizers: Optimizers  # the others are compared with the first
    output: File  # JSON
    gradients: Count = 100  # of each run
    rounds: Annotated[int, whole_number(2)] = 5  # runs of each
    task_option: Settings = ()  # for all tasks, or for the one named
    optimizer_option: Settings = ()  # for all optimizers, or for the one named
    threads: Count = 1


@dataclass(frozen=True)
class AgainOptions:
    """Make recorded runs once more with the code of today."""

    files: Positional[tuple[Path, ...]]
    optimizers: Optimizers  # whose runs
    output: File  # file of runs as JSON lines; it is continued
    seeds: Annotated[tuple[int, ...] | None, whole_number(0, many=True)] = None  # None: all
    lrs: Rates = None  # None: all that were recorded
    workers: Count = 1  # runs at a time
    threads: Count = 1  # of each run


@dataclass(frozen=True)
class QuickOptions:
    """Make a small frontier and its report, within a minute."""

    quick: bool = False
    output: Folder | None = None  # where the report goes (None: a temporary folder)


@dataclass(frozen=True)
class Grid:
    """Runs to be made: all combinations, of options by the names of tasks and optimizers."""

    tasks: Mapping[str, dict[str, Any]]
    optimizers: Mapping[str, dict[str, Any]]
    lrs: Sequence[float] | None  # None for the grid of task and optimizer
    budgets: Sequence[int]
    schedule: str = "linear"

    def cells(self, seeds: Sequence[int]) -> Iterable[list[RunSpec]]:
        """Yields the runs of what is tuned by itself: a task, an optimizer and a budget."""
        for task, optimizer, budget in product(self.tasks, self.optimizers, self.budgets):
            rates = self.lrs or find_optimizer(optimizer).grid(TASKS[task].learning_rates)
            options = self.tasks[task], self.optimizers[optimizer]
            yield [
                RunSpec(task, optimizer, lr, budget, seed, self.schedule, *options)
                for lr, seed in product(rates, seeds)
            ]

    def best_specs(self, path: Path, tune_seeds: Seeds, seeds: Seeds) -> list[RunSpec]:
        """Returns the runs at the learning rate that was best on the tuning seeds."""
        lines = {line["key"]: line for line in RunStore(path).lines}
        specs: list[RunSpec] = []
        for cell in self.cells(tune_seeds):
            tuning = tune([lines[spec.key] for spec in cell])
            if tuning.problem is not None:
                _say(f"{cell[0].task} {cell[0].optimizer} budget {tuning.budget}, "
                     f"best rate {tuning.lr:g}: {tuning.problem}")  # fmt: skip
            if math.isfinite(tuning.means[tuning.lr]):
                specs += [replace(cell[0], lr=tuning.lr, seed=seed) for seed in seeds]
        return specs


QUICK_GRIDS = (
    Grid(QUICK_TASKS, {"adamw": {}}, QUICK_RATES, (40, 80, 160)),
    Grid(QUICK_TASKS, {"adamw-x1.5": {}, "adamw-again": {}, "hybrid": {}}, QUICK_RATES, (80,)),
)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_options(
    flag: str, texts: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the options of each name, from texts such as ``batch=4`` and ``lm:batch=4``."""
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        left, equals, value = text.partition("=")
        owner, colon, option = left.rpartition(":")
        if not equals or not option:
            raise ValueError(f"{flag} {text!r}: must be NAME=VALUE or OWNER:NAME=VALUE")
        if colon and owner not in options:
            raise ValueError(f"{flag} {text!r}: {owner!r} must be one of {sorted(options)}")
        for name in [owner] if colon else names:
            options[name][option] = value
            with suppress(ValueError):  # what is no JSON stays text
                options[name][option] = json.loads(value)
    return options


def with_options(
    options: RunOptions | CostOptions,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns the options of each task and of each optimizer."""
    tasks = parse_options("--task-option", options.task_option, options.tasks)
    return tasks, parse_options("--optimizer-option", options.optimizer_option, options.optimizers)


def check_output(options: Any) -> None:
    """Refuses a file's name that is a folder's, and a folder's that is a file's."""
    path: Path | None = options.output
    folder = isinstance(options, (ReportOptions, NeverWorseOptions))
    if path is not None and path.exists() and path.is_dir() != folder:
        kinds = ("a folder", "a file") if folder else ("a file", "a folder")
        raise ValueError(f"--output {path}: must be {kinds[0]}, and is {kinds[1]}")


def run_command(options: RunOptions) -> None:
    """Trains what the file does not hold yet."""
    tasks, settings = with_options(options)
    grid = Grid(tasks, settings, options.lrs, options.budgets, options.schedule)

    def run(specs: Iterable[RunSpec]) -> int:
        return run_all(list(specs), options.output, options.workers, options.threads)

    added = run(chain.from_iterable(grid.cells(options.tune_seeds or options.seeds)))
    if options.tune_seeds:
        added += run(grid.best_specs(options.output, options.tune_seeds, options.seeds))
    _say(f"{added} runs added to {options.output}")


def quick_command(folder: Path | None) -> None:
    """Makes the quick frontier from scratch, and its report."""
    folder = folder or Path(tempfile.mkdtemp(prefix="frontier-quick-"))
    file = folder / "quick.jsonl"
    file.unlink(missing_ok=True)
    specs = [spec for grid in QUICK_GRIDS for cell in grid.cells(QUICK_SEEDS) for spec in cell]
    run_all(specs, file, workers=QUICK_WORKERS)
    write_report(load_lines([file]), folder)
    print(f"Report in {folder}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments:
            raise ValueError("give one of: run, report, pairs, never-worse, cost, again, --quick")
        if "--quick" in arguments:
            quick_command(parse(QuickOptions, arguments, prog=NAME).output)
            return 0
        commands = {
            "run": RunOptions, "report": ReportOptions, "pairs": PairsOptions,
            "never-worse": NeverWorseOptions, "cost": CostOptions, "again": AgainOptions,
        }  # fmt: skip
        options = parse(commands, arguments, prog=NAME, description=__doc__)
        check_output(options)
        if isinstance(options, RunOptions):
            run_command(options)
        elif isinstance(options, NeverWorseOptions):
            chosen = options.tasks, options.seeds, options.output, options.steps
            print(measure_never_worse(*chosen), flush=True)
        elif isinstance(options, CostOptions):
            torch.set_num_threads(options.threads)
            measured = with_options(options)
            table = measure_cost(*measured, options.gradients, options.rounds, options.output)
            Console().print(table)
        elif isinstance(options, AgainOptions):
            lines = load_lines(options.files)
            runs = select(lines, options.optimizers, options.seeds, options.lrs)
            Console().print(run_again(runs, options.output, options.workers, options.threads))
        elif isinstance(options, PairsOptions):
            write_pairs(load_lines(options.files), options.optimizer, options.output)
        else:
            write_report(load_lines(options.files), options.output)
    except (ValueError, RuntimeError) as error:
        _say(f"{NAME}: {error}")
        return REFUSED
    except KeyboardInterrupt:
        _say("interrupted; finished runs are kept")
        return INTERRUPTED
    return 0
