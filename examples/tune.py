"""Looks for the best settings of HybridOptimizer on GPT-2 and real text.

Trains with every combination of the given values from every given seed, on the data and with the
loss of gpt2_small.py, each for the same number of gradient evaluations, in the inline drive; and
torch.optim.AdamW with every learning rate for as many gradients. The lowest mean held-out loss
over the seeds wins. Seeds that chose the settings say too much good about them: report results on
other seeds. Without flags some minutes on two cores. Finished runs are kept in the output folder;
the same command goes on from there.

    python examples/tune.py
    python examples/tune.py --model small --gradients 50 --learning-rates 3e-4 6e-4 --seeds 100
    python examples/tune.py --schedule linear --predictor auto --heat-map learning_rate \
        confidence_threshold --over mean
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lib.files import save_figure, write_json
from lib.flags import INTERRUPTED, fail, parse, refuse, refuse_others
from lib.gpt2_options import options_of
from lib.gpt2_records import BASELINE, HYBRID, RecordStore, RunRecord
from lib.gpt2_training import follow, prepare, train
from lib.progress import progress
from lib.sweeps import AXES, Score, Settings, Sweep, SweepFlags, Trial, outcomes, scores
from lib.tables import cell, figures_table
from lib.text_data import TokenizedText
from triton_hybrid import HybridConfig

ROWS = 10
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


def parse_options(arguments: Sequence[str] | None = None) -> Sweep:
    """Reads the command line; a bad flag ends the program with a message that names it."""
    refuse_others(sys.argv[1:] if arguments is None else arguments, FORBIDDEN)
    flags: SweepFlags = parse(SweepFlags, arguments, description=__doc__)
    if len(flags.heat_map) != 2:
        refuse("--heat-map", " ".join(flags.heat_map), "two axes")
    rate = flags.learning_rates[0]
    base = options_of(flags, steps=flags.gradients, learning_rate=rate, drive="inline")
    sweep = Sweep(flags, base)
    try:
        for settings in sweep.grid:
            replace(base.hybrid, **settings.hybrid)
    except ValueError as error:
        fail(f"a value to try is not possible: {error}")
    return sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sweep with some flags, or those of this process, and returns the exit status."""
    sweep = parse_options(arguments)
    console = Console()
    text, content = prepare("tune", sweep.base)
    content["sweep"] = sweep.to_dict()
    # What a run's result depends on beside its trial. Where the text lies does not matter.
    surroundings = {
        "fixed": {name: value for name, value in sweep.fixed.items() if name != "data"},
        "text": content["data"]["sha256"],
        "tokenizer": content["data"]["tokenizer"],
        "versions": content["versions"],
    }
    store = RecordStore(sweep.base.output / "finished.jsonl", surroundings)
    interrupted = False
    try:
        run_all(sweep, store, text, console)
    except KeyboardInterrupt:
        interrupted = True
    finish(sweep, store, content, console, complete=not interrupted)
    if interrupted:
        console.print("Interrupted; the same command goes on from here.")
    return INTERRUPTED if interrupted else 0


def run_all(sweep: Sweep, store: RecordStore, text: TokenizedText, console: Console) -> None:
    """Does the runs that are still to be done."""
    everything, gradients = sweep.trials, sweep.flags.gradients
    waiting = [trial for trial in everything if store.get(asdict(trial)) is None]
    console.print(
        f"{len(everything)} runs of {gradients} gradients, {len(everything) - len(waiting)} of "
        "them already done",
        highlight=False,
    )
    with progress(console, len(waiting) * gradients, "gradients") as show:
        for number, trial in enumerate(waiting):
            what = "AdamW" if trial.settings is None else "Hybrid"
            title = f"{what}, seed {trial.seed}, rate {trial.learning_rate:g}"
            # In the inline drive every step has a gradient.
            report = follow(show, title, before=number * gradients)
            store.add(asdict(trial), run_trial(trial, sweep, text, report))


def run_trial(
    trial: Trial, sweep: Sweep, text: TokenizedText, report: Callable[[RunRecord], None]
) -> RunRecord:
    """Trains once."""
    options = sweep.options(trial)
    record = RunRecord(trial.name, trial.seed, options.steps, options.batch * options.length)
    train(record, options, text, report=report)
    return record


def finish(
    sweep: Sweep, store: RecordStore, content: dict[str, Any], console: Console, complete: bool
) -> None:
    """Writes the files and prints the table; `complete` says whether all runs are done."""
    folder, gradients = sweep.base.output, sweep.flags.gradients
    hybrid, adamw = scores(sweep, store, HYBRID), scores(sweep, store, BASELINE)
    best = best_of(sweep, hybrid)
    results = {
        **content,
        "complete": complete,
        "chosen_by": f"mean held-out loss after {gradients} gradients over the tuning seeds",
        "tuning_seeds": sweep.flags.seeds,
        "report_on": "other seeds than the tuning seeds",
        "best": best,
        "hybrid": [score.to_dict() for score in hybrid],
        "adamw": [score.to_dict() for score in adamw],
        "runs": outcomes(sweep, store),
    }
    write_json(folder / "results.json", results)
    if best is None:
        console.print("No settings have a result from every seed yet.")
        return
    write_json(folder / "best_config.json", best["hybrid_config"])
    write_heat_map(folder / "heat_map.png", sweep, hybrid, adamw)
    console.print(best_table(sweep, hybrid, adamw))
    for line in (
        f"Best settings:\n\nlr={best['learning_rate']!r}\n{best['python']}\n",
        "These seeds chose the settings: results must be reported on others, such as",
        best["report_with"],
        f"Results: {folder}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def best_of(sweep: Sweep, hybrid: Sequence[Score]) -> dict[str, Any] | None:
    """Returns the first of some scores, for the JSON file; None where there are none yet."""
    if not hybrid or hybrid[0].settings is None:
        return None
    settings = hybrid[0].settings
    config = replace(sweep.base.hybrid, **settings.hybrid)
    return {
        "learning_rate": settings.learning_rate,
        "held_out_mean": hybrid[0].mean,
        "python": python_line(config),
        "hybrid_config": config.to_dict(),
        "report_with": reporting_command(sweep, settings),
    }


def python_line(config: HybridConfig) -> str:
    """Returns the Python that makes a configuration; what is default and not swept is left out."""
    defaults = HybridConfig()
    said = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(HybridConfig)
        if field.name in AXES or getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return f"HybridConfig({', '.join(said)})"


def reporting_command(sweep: Sweep, settings: Settings) -> str:
    """Returns a command that reports settings on seeds that did not choose them."""
    first = max(sweep.flags.seeds) + 1
    swept = {f"--{name.replace('_', '-')}": value for name, value in settings.hybrid.items()}
    flags = {"--drive": "inline", "--steps": sweep.base.steps, "--lr": settings.learning_rate}
    parts = ["--model", sweep.base.model, *sweep.handed_on]
    parts += [str(part) for flag in {**flags, **swept}.items() for part in flag]
    seeds = [str(first + n) for n in range(3)]
    return shlex.join(["python", "examples/gpt2_small.py", *parts, "--controls", "--seeds", *seeds])


def best_table(sweep: Sweep, hybrid: Sequence[Score], adamw: Sequence[Score]) -> Table:
    """Returns the table of the best settings, and of AdamW; the best of either come first."""
    seeds = ", ".join(map(str, sweep.flags.seeds))
    headings = ("", "learning\nrate", "confidence\nthreshold", "predict\nsteps",
                "correction\ninterval", "held-out\nmean", "deviation\nof seeds",
                "predicted\nsteps")  # fmt: skip
    title = f"Held-out loss after {sweep.base.steps} gradients, mean of tuning seeds {seeds}"
    table = figures_table(title, headings)
    for name, found in (("Hybrid ", hybrid[:ROWS]), ("AdamW", adamw)):
        for score in found:
            swept = score.settings.hybrid.values() if score.settings else (None,) * 3
            shown = [cell(value, "{:g}") for value in swept]
            losses = f"{score.mean:.4f}", cell(score.deviation, "{:.4f}")
            predicted = cell(score.statistics.get("predicted_steps"), "{:.1f}")
            table.add_row(name, f"{score.learning_rate:g}", *shown, *losses, predicted)
        table.add_section()
    if len(hybrid) > ROWS:
        table.caption = f"the best {ROWS} of {len(hybrid)} settings of HybridOptimizer"
    return table


def heat_values(sweep: Sweep, hybrid: Sequence[Score]) -> list[list[float]]:
    """Returns the heat map's rows, from the lowest value of its vertical axis; NaN of nothing."""
    horizontal, vertical = sweep.flags.heat_map
    means = {score.settings: score.mean for score in hybrid}
    cells: dict[tuple[Any, Any], list[float]] = {}
    for settings in sweep.grid:
        mean = means.get(settings.canonical)
        if mean is not None:
            place = getattr(settings, horizontal), getattr(settings, vertical)
            cells.setdefault(place, []).append(mean)
    reduce = min if sweep.flags.over == "min" else statistics.fmean
    across, up = sorted(sweep.values[horizontal]), sorted(sweep.values[vertical])
    rows = [[reduce(cells.get((x, y), [math.nan])) for x in across] for y in up]
    return [[value if math.isfinite(value) else math.nan for value in row] for row in rows]


def write_heat_map(
    path: Path, sweep: Sweep, hybrid: Sequence[Score], adamw: Sequence[Score]
) -> None:
    """Draws the held-out loss over two of the axes."""
    rows, axes, flags = heat_values(sweep, hybrid), sweep.flags.heat_map, sweep.flags
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    finite = [value for row in rows for value in row if math.isfinite(value)] or [0.0]
    least, most = min(finite), max(finite)
    look: dict[str, Any] = {"cmap": "viridis_r", "aspect": "auto", "origin": "lower"}
    image = axis.imshow(rows, vmin=least, vmax=most, **look)
    figure.colorbar(image, ax=axis, label="held-out loss")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "white" if value > (least + most) / 2 else "black"
            axis.text(x, y, f"{value:.4f}", ha="center", va="center", color=colour)
    across, up = ([f"{value:g}" for value in sorted(sweep.values[name])] for name in axes)
    axis.set_xticks(range(len(across)), across)
    axis.set_yticks(range(len(up)), up)
    axis.set_xlabel(axes[0])
    axis.set_ylabel(axes[1])
    others = " and ".join(name for name in AXES if name not in axes)
    which = "lowest" if flags.over == "min" else "mean"
    title = (
        f"HybridOptimizer, GPT-2 {flags.model}, {flags.gradients} gradients\n"
        f"mean held-out loss of {len(flags.seeds)} seeds, {which} over {others}"
    )
    if adamw:
        title += f"\nAdamW, best learning rate {adamw[0].learning_rate:g}: {adamw[0].mean:.4f}"
    axis.set_title(title, fontsize="medium")
    save_figure(path, figure)


if __name__ == "__main__":
    raise SystemExit(main())
