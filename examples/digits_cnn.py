"""Counts how many gradients a small convolutional network needs to recognise digits.

Without flags: scikit-learn's digits (8 x 8 pixels, nothing is downloaded), a network of 49,788
parameters, the target 97 % of the test images. With MNIST's files in a folder: 99 % of its test
images. ``--help`` says how the comparison is made, and lists what can be changed.

    python examples/digits_cnn.py
    python examples/digits_cnn.py --data FOLDER --seeds 0 1 2 3 4
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from digits_data import Digits, load_digits
from digits_options import Options, parse_options
from digits_report import progress, result_table, write_plot
from digits_results import Row, Tried, faster, results
from digits_training import WEIGHT_DECAY, Contender, parameter_count, train
from rich.console import Console
from run_files import environment, write_json

from triton_hybrid import HybridConfig

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
REFUSED = 2

# Chosen on seeds 100 to 111 and validation images, then left alone. Both start early, since AdamW
# is done after some 45 gradients. The first moves only where the trajectory of the last cycles
# went on as fitted; the second moves after almost every gradient.
CONSERVATIVE = HybridConfig(
    warmup_steps=5,
    full_steps=2,
    max_predict_steps=4,
    correction_interval=1,
    predictor="subspace",
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
MUONS = (
    Contender(
        "muon", "Muon, no prediction", "tab:olive", HybridConfig(predictor="none"), muon=True
    ),
    Contender("muon_hybrid", "Hybrid, on Muon", "tab:green", AGGRESSIVE, muon=True),
)
CONTROL = Contender("control", "AdamW, as many", "black")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The exit status.
    """
    options = parse_options(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    try:
        digits = load_digits(options.data)
        check_batch(options, digits)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"digits_cnn.py: error: {error}", file=sys.stderr)
        return REFUSED
    content = describe(options, digits)
    introduce(console, options, content)
    rows = [Row(contender) for contender in (ADAMW, *HYBRIDS, *MUONS)]
    status = 0
    try:
        per_row = len(options.learning_rates) * len(options.tuning_seeds) + len(options.seeds)
        with progress(console, (len(rows) + 1) * per_row) as report:
            run_all(rows, options, digits, report)
    except KeyboardInterrupt:
        status = INTERRUPTED
    shown = [row for row in rows if row.runs]
    if shown:
        console.print(result_table(shown, options.recipe))
        title = f"{content['data']['description']}; learning rate {options.recipe.schedule}"
        write_plot(options.output / "accuracy.png", shown, options.recipe, title)
    write_json(
        options.output / "results.json",
        results(content, rows, options.recipe, complete=status == 0),
    )
    console.print(f"Results: {options.output}", highlight=False, soft_wrap=True)
    if status:
        console.print("Interrupted; this is what was done until then.")
    return status


def check_batch(options: Options, digits: Digits) -> None:
    """Sees that a batch is not larger than the data.

    Raises:
        ValueError: It is.
    """
    most = len(digits.training)
    if options.recipe.batch > most:
        raise ValueError(
            f"argument --batch: {options.recipe.batch} images; allowed: 1 to {most}, the training "
            "images there are"
        )


def describe(options: Options, digits: Digits) -> dict[str, Any]:
    """Returns what the JSON file says beside the runs.

    Args:
        options: The flags.
        digits: The data.
    """
    surroundings = environment(torch.device("cpu"))
    for package in ("scikit-learn", "scipy"):
        surroundings["versions"][package] = metadata.version(package)
    return {
        "example": "digits_cnn",
        **surroundings,
        "options": options.to_dict(),
        "weight_decay": WEIGHT_DECAY,
        "parameters": parameter_count(digits.size),
        "data": {"description": digits.description, "sha256": digits.digest()},
    }


def introduce(console: Console, options: Options, content: dict[str, Any]) -> None:
    """Says what is about to happen.

    Args:
        console: Where to say it.
        options: The flags.
        content: What the JSON file says beside the runs.
    """
    recipe = options.recipe
    rates = " ".join(f"{rate:g}" for rate in options.learning_rates)
    console.print(
        f"{content['data']['description']}\n"
        f"{content['parameters']:,} parameters, FP32 on {content['hardware']['processor']}, "
        f"{options.threads} thread(s)\n"
        f"{recipe.budget} gradients of {recipe.batch} images, learning rate {recipe.schedule}, "
        f"the same for all\n"
        f"Rates {rates}, chosen on validation images and seeds "
        f"{' '.join(map(str, options.tuning_seeds))}",
        highlight=False,
    )


def run_all(
    rows: list[Row], options: Options, digits: Digits, report: Callable[[str], None]
) -> None:
    """Tunes, runs the reported seeds, and adds the control.

    Args:
        rows: Take the runs; the control's row is appended.
        options: The flags.
        digits: The data.
        report: Called after every run, with what it was.
    """
    recipe = options.recipe
    for row in rows:
        tune(row, recipe.budget, options, digits, report)
    # Seed by seed, so that what else the machine does falls on all optimizers.
    for seed in options.seeds:
        for row in rows:
            run(row, seed, recipe.budget, options, digits, report)
    fastest = faster([row for row in rows if row.contender in HYBRIDS], recipe.target)
    control = Row(CONTROL)
    # Its rate suits a run as long as the reported ones, but must not know how long they are.
    needed = [n for n in fastest.best.evaluations if n is not None]
    tune(
        control,
        round(sum(needed) / len(needed)) if needed else recipe.budget,
        options,
        digits,
        report,
    )
    rows.append(control)
    for seed in options.seeds:
        reached = fastest.runs[seed].reached(recipe.target)
        budget = recipe.budget if reached is None else reached.gradients
        run(control, seed, budget, options, digits, report)


def tune(
    row: Row, budget: int, options: Options, digits: Digits, report: Callable[[str], None]
) -> None:
    """Tries all learning rates on the tuning seeds and the validation images.

    Args:
        row: The optimizer; takes what came out.
        budget: Gradient evaluations of each run.
        options: The flags.
        digits: The data.
        report: Called after every run.
    """
    recipe = replace(options.recipe, budget=budget)
    for rate in options.learning_rates:
        runs = []
        for seed in options.tuning_seeds:
            runs.append(
                train(
                    row.contender,
                    recipe,
                    digits,
                    digits.validation,
                    seed=seed,
                    learning_rate=rate,
                )
            )
            report(f"Tuning {row.contender.title}")
        points = [run.reached(recipe.target) for run in runs]
        row.tried.append(
            Tried(
                rate,
                tuple(None if point is None else point.gradients for point in points),
                tuple(run.final_accuracy for run in runs),
                budget,
            )
        )


def run(
    row: Row,
    seed: int,
    budget: int,
    options: Options,
    digits: Digits,
    report: Callable[[str], None],
) -> None:
    """Runs a reported seed, judged on the test images.

    Args:
        row: The optimizer; takes the run.
        seed: The seed.
        budget: Gradient evaluations.
        options: The flags.
        digits: The data.
        report: Called after the run.
    """
    row.runs[seed] = train(
        row.contender,
        replace(options.recipe, budget=budget),
        digits,
        digits.test,
        seed=seed,
        learning_rate=row.best.learning_rate,
    )
    report(f"Seed {seed}: {row.contender.title}")


if __name__ == "__main__":
    raise SystemExit(main())
