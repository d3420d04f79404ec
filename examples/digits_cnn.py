"""Counts how many gradients a small convolutional network needs to recognise digits.

Trains about 50,000 parameters with torch's AdamW, with HybridOptimizer in a conservative and in an
aggressive configuration, and with both kinds of Muon, without prediction and with it. Every
optimizer gets the learning rate of one grid that reaches the target accuracy soonest on validation
images and seeds of their own; then the test images and the reported seeds say how many gradient
evaluations it needs. The control is AdamW with as many gradients as the faster HybridOptimizer
needed, its schedule compressed to them. Without flags: scikit-learn's digits (8 x 8 pixels, nothing
is downloaded) and the target 97 %; with MNIST's files in a folder 99 %.

    python examples/digits_cnn.py
    python examples/digits_cnn.py --data FOLDER --seeds 0 1 2 3 4
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console

from lib.digits_data import Digits, load_digits
from lib.digits_report import Row, Tried, faster, result_table, write_plot
from lib.digits_training import WEIGHT_DECAY, Contender, Recipe, parameter_count, train
from lib.environment import environment
from lib.files import write_json
from lib.flags import (
    INTERRUPTED,
    fail,
    output_folder,
    parse,
    real_number,
    refuse,
    several_seeds,
    whole_number,
)
from lib.progress import progress
from triton_hybrid import HybridConfig

FEWEST_RATES = 4

# Chosen on seeds 100 to 111 and validation images, then left alone. Both start early, since AdamW
# is done after some 45 gradients. The first moves only where the trajectory of the last cycles
# went on as fitted; the second moves after almost every gradient.
CONSERVATIVE = HybridConfig(
    warmup_steps=5,
    full_steps=2,
    max_predict_steps=4,
    correction_interval=1,
    confidence_threshold=0.3,
    predictor="linear",
)
AGGRESSIVE = HybridConfig(
    warmup_steps=2,
    full_steps=1,
    max_predict_steps=16,
    correction_interval=1,
    predictor="slow_ema",
    slow_beta=0.8,
)

ADAMW = Contender("adamw", "AdamW", "0.35")
HYBRIDS = (
    Contender("conservative", "Hybrid, conservative", "tab:blue", CONSERVATIVE),
    Contender("aggressive", "Hybrid, aggressive", "tab:purple", AGGRESSIVE),
)
# The base rule and the prediction are two things: Muon stands here without and with it.
STILL = HybridConfig(predictor="none")
MUONS = (
    Contender("muon", "Muon, no prediction", "tab:olive", STILL, muon=True),
    Contender("muon_hybrid", "Hybrid, on Muon", "tab:green", AGGRESSIVE, muon=True),
)
CONTROL = Contender("control", "AdamW, as many", "black")


@dataclass(frozen=True, kw_only=True)
class Flags(Recipe):
    """The flags of this example; what MNIST asks for instead stands in `MNIST`.

    Attributes:
        data: Folder of MNIST's four IDX files, plain or .gz; None: scikit-learn's digits. With
            MNIST the defaults are 2,000 gradients of 64 images, measured every 20, to 0.99, and
            learning rates from 0.0005 to 0.008.
        seeds: Reported seeds.
        tuning_seeds: Seeds that learning rates are chosen on.
        lrs: Learning rates to choose from, at least 4.
        threads: CPU threads; more than one would wait for each other, as small as the network is.
        output: Folder for results; TIME in it stands for the time.
    """

    data: Path | None = None
    seeds: Annotated[tuple[int, ...], several_seeds()] = (0, 1, 2)
    tuning_seeds: Annotated[tuple[int, ...], several_seeds()] = (200, 201, 202)
    lrs: Annotated[tuple[float, ...], real_number(0, above=True, many=True)] = (
        4e-3, 5.6e-3, 8e-3, 1.12e-2, 1.6e-2
    )  # fmt: skip
    threads: Annotated[int, whole_number(1)] = 1
    output: Path = Path("runs/digits_cnn-TIME")

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, for the JSON file."""
        values = dataclasses.asdict(self)
        del values["output"]
        values["learning_rates"] = values.pop("lrs")
        return {**values, "data": None if self.data is None else self.data.name}


MNIST = Flags(budget=2_000, batch=64, interval=20, target=0.99, lrs=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))


def parse_options(arguments: Sequence[str] | None = None) -> Flags:
    """Reads the command line; a bad flag ends the program with a message that names it."""
    given = sys.argv[1:] if arguments is None else arguments
    mnist = any(argument.partition("=")[0] == "--data" for argument in given)
    flags: Flags = parse(Flags, given, default=MNIST if mnist else Flags(), description=__doc__)
    shared = sorted(set(flags.seeds) & set(flags.tuning_seeds))
    if shared:
        refuse("--tuning-seeds", shared[0], "others than the reported seeds")
    if len(flags.lrs) < FEWEST_RATES:
        allowed = f"at least {FEWEST_RATES}, or the baseline is not tuned"
        refuse("--lrs", f"a choice of {len(flags.lrs)} rates", allowed)
    if flags.interval > flags.budget:
        refuse("--interval", flags.interval, f"1 to {flags.budget}, the length of a run")
    return replace(flags, lrs=tuple(sorted(flags.lrs)), output=output_folder(flags.output))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example with some flags, or those of this process, and returns the exit status."""
    flags = parse_options(arguments)
    console = Console()
    torch.set_num_threads(flags.threads)
    try:
        digits = load_digits(flags.data)
        images = len(digits.training)
        if flags.batch > images:
            refuse("--batch", flags.batch, f"1 to {images}, the training images there are")
        flags.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    content = describe(flags, digits)
    introduce(console, flags, content)
    rows = [Row(contender) for contender in (ADAMW, *HYBRIDS, *MUONS)]
    interrupted = False
    try:
        per_row = len(flags.lrs) * len(flags.tuning_seeds) + len(flags.seeds)
        with progress(console, (len(rows) + 1) * per_row, "runs") as show:
            done = itertools.count(1)
            run_all(rows, flags, digits, lambda title: show(next(done), title))
    except KeyboardInterrupt:
        interrupted = True
    shown = [row for row in rows if row.runs]
    if shown:
        console.print(result_table(shown, flags))
        title = f"{content['data']['description']}; learning rate {flags.schedule}"
        write_plot(flags.output / "accuracy.png", shown, flags, title)
    optimizers = {row.contender.name: row.to_dict(rows[0], flags.target) for row in rows}
    results = {**content, "complete": not interrupted, "optimizers": optimizers}
    write_json(flags.output / "results.json", results)
    console.print(f"Results: {flags.output}", highlight=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; this is what was done until then.")
    return INTERRUPTED if interrupted else 0


def describe(flags: Flags, digits: Digits) -> dict[str, Any]:
    """Returns what the JSON file says beside the runs."""
    return {
        "example": "digits_cnn",
        **environment(torch.device("cpu"), ("scikit-learn", "scipy")),
        "options": flags.to_dict(),
        "weight_decay": WEIGHT_DECAY,
        "parameters": parameter_count(digits.size),
        "data": {"description": digits.description, "sha256": digits.digest()},
    }


def introduce(console: Console, flags: Flags, content: dict[str, Any]) -> None:
    """Says what is about to happen."""
    rates = " ".join(f"{rate:g}" for rate in flags.lrs)
    console.print(
        f"{content['data']['description']}\n"
        f"{content['parameters']:,} parameters, FP32 on {content['hardware']['processor']}, "
        f"{flags.threads} thread(s)\n"
        f"{flags.budget} gradients of {flags.batch} images, learning rate {flags.schedule}, "
        f"the same for all\n"
        f"Rates {rates}, chosen on validation images and seeds "
        f"{' '.join(map(str, flags.tuning_seeds))}",
        highlight=False,
    )


def run_all(rows: list[Row], flags: Flags, digits: Digits, report: Callable[[str], None]) -> None:
    """Tunes, runs the reported seeds, and adds the control.

    Args:
        rows: Take the runs; the control's row is appended.
        flags: The flags.
        digits: The data.
        report: Called after every run, with what it was.
    """
    for row in rows:
        tune(row, flags, digits, report)
    # Seed by seed, so that what else the machine does falls on all optimizers.
    for seed in flags.seeds:
        for row in rows:
            run(row, seed, flags, digits, report)
    fastest = faster([row for row in rows if row.contender in HYBRIDS], flags.target)
    control = Row(CONTROL)
    # Its rate suits a run as long as the reported ones, but must not know how long they are.
    needed = [n for n in fastest.best.evaluations if n is not None]
    budget = round(sum(needed) / len(needed)) if needed else flags.budget
    tune(control, replace(flags, budget=budget), digits, report)
    rows.append(control)
    for seed in flags.seeds:
        reached = fastest.runs[seed].reached(flags.target)
        budget = flags.budget if reached is None else reached.gradients
        run(control, seed, replace(flags, budget=budget), digits, report)


def tune(row: Row, flags: Flags, digits: Digits, report: Callable[[str], None]) -> None:
    """Tries all learning rates on the tuning seeds and the validation images."""
    for rate in flags.lrs:
        runs = []
        for seed in flags.tuning_seeds:
            part = digits.validation
            runs.append(train(row.contender, flags, digits, part, seed=seed, learning_rate=rate))
            report(f"Tuning {row.contender.title}")
        points = [found.reached(flags.target) for found in runs]
        evaluations = tuple(None if point is None else point.gradients for point in points)
        accuracies = tuple(found.final_accuracy for found in runs)
        row.tried.append(Tried(rate, evaluations, accuracies, flags.budget))


def run(row: Row, seed: int, flags: Flags, digits: Digits, report: Callable[[str], None]) -> None:
    """Runs a reported seed, judged on the test images."""
    rate = row.best.learning_rate
    row.runs[seed] = train(row.contender, flags, digits, digits.test, seed=seed, learning_rate=rate)
    report(f"Seed {seed}: {row.contender.title}")


if __name__ == "__main__":
    raise SystemExit(main())
