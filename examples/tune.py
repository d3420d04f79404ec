"""Looks for the best settings of HybridOptimizer on GPT-2 and real text.

Without flags: the tiny model, three learning rates and two values each of confidence threshold,
horizon and correction interval, from two seeds, 40 gradients each; some minutes on two cores.
``--help`` lists what can be changed. Stopped, it goes on where it was.

    python examples/tune.py
    python examples/tune.py --model small --gradients 50 --learning-rates 3e-4 6e-4 --seeds 100
    python examples/tune.py --schedule linear --predictor auto --heat-map learning_rate \
        confidence_threshold --over mean
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpt2_small import INTERRUPTED, REFUSED, prepare_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_files import environment, write_json
from run_records import BASELINE, HYBRID, RunRecord
from text_data import Corpus, TokenizedText
from training_run import parameter_count, use_device
from tune_options import Sweep, parse_options
from tune_report import best_table, python_line, reporting_command, write_heat_map
from tune_trials import Score, Trial, TrialStore, run_trial, scores, trials

SECONDS_BETWEEN_LINES = 30.0

Report = Callable[[RunRecord], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sweep.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The exit status.
    """
    sweep = parse_options(arguments)
    options = sweep.base
    console = Console()
    use_device(options)
    try:
        corpus, text = prepare_text(options)
        options.output.mkdir(parents=True, exist_ok=True)
        content = describe(sweep, corpus, text)
        store = TrialStore(options.output / "trials.jsonl", surroundings(sweep, content))
    except (ValueError, OSError) as error:
        print(f"tune.py: error: {error}", file=sys.stderr)
        return REFUSED
    interrupted = False
    try:
        run_all(sweep, store, text, console)
    except KeyboardInterrupt:
        interrupted = True
    finish(sweep, store, content, console, complete=not interrupted)
    if interrupted:
        console.print("Interrupted; the same command goes on from here.")
        return INTERRUPTED
    return 0


def describe(sweep: Sweep, corpus: Corpus, text: TokenizedText) -> dict[str, Any]:
    """Returns what the JSON file says beside the results.

    Args:
        sweep: The sweep.
        corpus: The text.
        text: Its tokens.
    """
    return {
        "example": "tune",
        **environment(sweep.base.device),
        "sweep": sweep.to_dict(),
        "parameters": parameter_count(sweep.base, text),
        "data": {
            "description": corpus.description,
            "split": corpus.split,
            "sha256": corpus.digest(),
            "tokenizer": text.description,
            "vocabulary": text.vocabulary,
        },
    }


def surroundings(sweep: Sweep, content: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run's result depends on beside its trial.

    Args:
        sweep: The sweep.
        content: What the JSON file says beside the results.
    """
    fixed = sweep.fixed
    # Where the text lies does not matter, and what it is does.
    del fixed["data"]
    return {
        "fixed": fixed,
        "text": content["data"]["sha256"],
        "tokenizer": content["data"]["tokenizer"],
        "versions": content["versions"],
    }


def run_all(sweep: Sweep, store: TrialStore, text: TokenizedText, console: Console) -> None:
    """Does the runs that are still to be done.

    Args:
        sweep: The sweep.
        store: Takes them.
        text: What to train on.
        console: Where to show progress.
    """
    everything = trials(sweep)
    waiting = [trial for trial in everything if store.get(trial) is None]
    console.print(
        f"{len(everything)} runs of {sweep.gradients} gradients, "
        f"{len(everything) - len(waiting)} of them already done",
        highlight=False,
    )
    with progress(console, len(waiting) * sweep.gradients, sweep.gradients) as follow:
        for number, trial in enumerate(waiting):
            report = follow(number, trial)
            store.add(trial, run_trial(trial, sweep, text, report))


@contextmanager
def progress(
    console: Console, total: int, gradients: int
) -> Iterator[Callable[[int, Trial], Report]]:
    """Shows how the sweep gets on: a bar in a terminal, now and then a line elsewhere.

    Args:
        console: Where to show it.
        total: Gradients of all runs.
        gradients: Of each.

    Yields:
        What to call for every run; it returns what to call after every step.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total)
    started = last = time.monotonic()

    def follow(number: int, trial: Trial) -> Report:
        what = "AdamW" if trial.settings is None else "Hybrid"
        title = f"{what}, seed {trial.seed}, rate {trial.learning_rate:g}"

        def report(record: RunRecord) -> None:
            nonlocal last
            done = number * gradients + record.gradients
            bar.update(task, completed=done, description=title)
            now = time.monotonic()
            if console.is_terminal or now - last < SECONDS_BETWEEN_LINES:
                return
            last = now
            left = (now - started) / done * (total - done)
            console.print(
                f"{title}: {done:,} of {total:,} gradients, {left:.0f} s left", highlight=False
            )

        return report

    with bar:
        yield follow


def finish(
    sweep: Sweep, store: TrialStore, content: dict[str, Any], console: Console, complete: bool
) -> None:
    """Writes the files and prints the table.

    Args:
        sweep: The sweep.
        store: Its finished runs.
        content: What the JSON file says beside the results.
        console: Where to print.
        complete: Whether all runs are done.
    """
    folder = sweep.base.output
    hybrid, adamw = scores(sweep, store, HYBRID), scores(sweep, store, BASELINE)
    best = choice(sweep, hybrid)
    outcomes = [(trial, store.get(trial)) for trial in trials(sweep)]
    write_json(
        folder / "results.json",
        {
            **content,
            "complete": complete,
            "chosen_by": f"mean held-out loss after {sweep.gradients} gradients over the "
            "tuning seeds",
            "tuning_seeds": sweep.seeds,
            "report_on": "other seeds than the tuning seeds",
            "best": best,
            "hybrid": [score.to_dict() for score in hybrid],
            "adamw": [score.to_dict() for score in adamw],
            "runs": [
                {**trial.to_dict(), **outcome.to_dict()}
                for trial, outcome in outcomes
                if outcome is not None
            ],
        },
    )
    if best is None:
        console.print("No settings have a result from every seed yet.")
        return
    write_json(folder / "best_config.json", best["hybrid_config"])
    write_heat_map(folder / "heat_map.png", sweep, hybrid, adamw)
    console.print(best_table(sweep, hybrid, adamw))
    console.print("Best settings:")
    for line in ("", f"lr={best['learning_rate']!r}", best["python"], ""):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"These seeds chose the settings: results must be reported on others, such as\n"
        f"{best['report_with']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Results: {folder}", highlight=False, soft_wrap=True)


def choice(sweep: Sweep, hybrid: Sequence[Score]) -> dict[str, Any] | None:
    """Returns the best settings, for the JSON file; None where there are none yet.

    Args:
        sweep: The sweep.
        hybrid: HybridOptimizer's scores, the best first.
    """
    if not hybrid or hybrid[0].settings is None:
        return None
    settings = hybrid[0].settings
    config = settings.config(sweep.base.hybrid)
    return {
        "learning_rate": settings.learning_rate,
        "held_out_mean": hybrid[0].mean,
        "python": python_line(config),
        "hybrid_config": config.to_dict(),
        "report_with": reporting_command(sweep, settings),
    }


if __name__ == "__main__":
    raise SystemExit(main())
