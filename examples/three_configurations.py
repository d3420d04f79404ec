"""Compares three configurations on GPT-2: AdamW, HybridOptimizer, and that with less memory.

Beside them run two controls: AdamW with exactly as many gradients as HybridOptimizer used, its
learning-rate schedule compressed to them; and AdamW in 16 bits without prediction. Without flags:
the tiny model, three seeds, under five minutes on a CPU, nothing downloaded. Finished runs are
kept; the same command goes on from there.

    python examples/three_configurations.py
    python examples/three_configurations.py --model small --seeds 0 1 2 3 4
    python examples/three_configurations.py --precision fp16 --offload pinned
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurations_options import CONFIGURATIONS, Plan, parse_options
from configurations_plots import write_plot
from configurations_report import TITLES, complete_seeds, print_tables, write_results
from configurations_runs import (
    ConfigurationRun,
    DivergedError,
    RunStore,
    order,
    run_configuration,
)
from gpt2_small import INTERRUPTED, REFUSED, describe, prepare_text
from host_memory import keep_freed_memory
from reporting import progress
from rich.console import Console
from run_records import CONTROL, HYBRID
from text_data import TokenizedText
from training_run import use_device

RUNS_FILE = "runs.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The exit status.
    """
    plan = parse_options(arguments)
    base = plan.base
    console = Console()
    use_device(base)
    kept = keep_freed_memory(base.device)
    runs: list[ConfigurationRun] = []
    try:
        try:
            corpus, text = prepare_text(base)
            base.output.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            return refuse(error)
        content = content_of(plan, describe(base, corpus, text, kept))
        store = RunStore(base.output / RUNS_FILE, surroundings(content))
        for index, seed in enumerate(base.seeds):
            run_seed(index, seed, plan, text, store, runs, console)
            save(plan, content, runs, complete=index + 1 == len(base.seeds))
    except KeyboardInterrupt:
        print_tables(console, complete_seeds(runs), plan)
        console.print("Interrupted; the same command goes on from here.")
        return INTERRUPTED
    except (DivergedError, NotImplementedError) as error:
        return refuse(error)
    print_tables(console, complete_seeds(runs), plan)
    console.print(f"Results: {base.output}", highlight=False, soft_wrap=True)
    return 0


def refuse(error: Exception) -> int:
    """Says what is wrong, and returns the exit status for it."""
    print(f"three_configurations.py: error: {error}", file=sys.stderr)
    return REFUSED


def content_of(plan: Plan, description: dict[str, Any]) -> dict[str, Any]:
    """Returns what the JSON file says beside the runs.

    Args:
        plan: The settings.
        description: What gpt2_small.py says about hardware, versions and data.
    """
    return {
        **description,
        "example": "three_configurations",
        "configurations": {name: plan.settings(name) for name in CONFIGURATIONS},
        "seeds": list(plan.base.seeds),
        "statistics": f"scipy {metadata.version('scipy')}",
    }


def surroundings(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run depends on beside its settings: times of other machines do not mix.

    Args:
        content: What `content_of` returns.
    """
    return {name: content[name] for name in ("hardware", "versions", "data")}


def run_seed(
    index: int,
    seed: int,
    plan: Plan,
    text: TokenizedText,
    store: RunStore,
    runs: list[ConfigurationRun],
    console: Console,
) -> None:
    """Runs every configuration from one seed, except those that are finished.

    Args:
        index: The place of the seed among the seeds.
        seed: The seed.
        plan: The settings.
        text: What to train on.
        store: Has the finished runs and takes new ones.
        runs: Takes all of this seed's.
        console: Where to show progress.
    """
    done: dict[str, ConfigurationRun] = {}
    for configuration in order(index):
        steps = done[HYBRID].gradients if configuration == CONTROL else plan.base.steps
        key = store.key(plan, configuration, seed, steps)
        run = store.get(key)
        title = f"Seed {seed}: {TITLES[configuration]}"
        if run is None:
            with progress(console, title, steps) as report:
                run = run_configuration(configuration, seed, steps, plan, text, report)
            store.add(key, run)
        else:
            console.print(f"{title}: kept from before", highlight=False)
        done[configuration] = run
        runs.append(run)


def save(
    plan: Plan, content: dict[str, Any], runs: Sequence[ConfigurationRun], complete: bool
) -> None:
    """Writes the JSON file and the plot.

    Args:
        plan: The settings.
        content: What `content_of` returns.
        runs: The runs so far.
        complete: Whether there are no more to come.
    """
    base = plan.base
    write_results(base.output / "results.json", content, runs, complete)
    title = (
        f"GPT-2 {base.model}, {base.steps} steps of {base.batch} x {base.length} tokens, seeds "
        f"{', '.join(map(str, base.seeds))}"
    )
    write_plot(base.output / "plot.png", runs, title)


if __name__ == "__main__":
    raise SystemExit(main())
