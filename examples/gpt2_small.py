"""Trains GPT-2 small twice, with AdamW and with HybridOptimizer, and compares the two.

Without flags: 50 steps of 4 x 64 tokens of real text at a learning rate of 6e-4, from the same
seed and on the same batches. Nothing is downloaded. ``--help`` lists what can be changed.

    python examples/gpt2_small.py
    python examples/gpt2_small.py --model tiny --steps 200 --seeds 0 1 2
    python examples/gpt2_small.py --base muon
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpt2_options import Options, parse_options
from host_memory import keep_freed_memory, release_memory
from reporting import progress, result_table, seeds_table
from rich.console import Console
from run_files import environment, seed_summary, write_json, write_plot
from run_records import (
    ADAMW,
    ALONE,
    BASELINE,
    BASES,
    CONTROL,
    HYBRID,
    RunRecord,
    SeedRecord,
)
from text_data import Corpus, TokenizedText, check_length, load_corpus, tokenize
from training_run import HYBRIDS, parameter_count, train, use_device

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The exit status.
    """
    options = parse_options(arguments)
    console = Console()
    use_device(options)
    kept = keep_freed_memory(options.device)
    records: list[SeedRecord] = []
    interrupted = False
    try:
        try:
            corpus, text = prepare_text(options)
            options.output.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            print(f"gpt2_small.py: error: {error}", file=sys.stderr)
            return REFUSED
        content = describe(options, corpus, text, kept)
        introduce(console, options, content)
        for seed in options.seeds:
            record = SeedRecord(seed)
            records.append(record)
            try:
                run_seed(
                    record,
                    options,
                    text,
                    console,
                    save_all=lambda: save(content, records, options, complete=False),
                )
            finally:
                if any(run.steps for run in record.runs):
                    console.print(result_table(record, options.device))
        save(content, records, options, complete=True)
    except KeyboardInterrupt:
        interrupted = True
    if len(records) > 1:
        console.print(seeds_table(records))
    if any(run.hybrid and run.baseline and not run.control for run in records) and not interrupted:
        console.print("AdamW with as many gradients, its schedule compressed to them: --controls")
    if records:
        console.print(f"Results: {options.output}", highlight=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; this is what was done until then.")
        return INTERRUPTED
    return 0


def prepare_text(options: Options) -> tuple[Corpus, TokenizedText]:
    """Reads and tokenizes the text, and sees that there is enough of it.

    Args:
        options: Says which text.

    Returns:
        The text, and its tokens.
    """
    corpus = load_corpus(options.data)
    text = tokenize(corpus, options.vocabulary, options.tokenizer)
    check_length(text, options.length)
    return corpus, text


def describe(
    options: Options, corpus: Corpus, text: TokenizedText, freed_memory_kept: bool
) -> dict[str, Any]:
    """Returns what the JSON file says beside the runs.

    Args:
        options: The flags.
        corpus: The text.
        text: Its tokens.
        freed_memory_kept: What `keep_freed_memory` returned.
    """
    surroundings = environment(options.device)
    # Times with and without are not comparable.
    surroundings["hardware"]["freed_memory_kept"] = freed_memory_kept
    return {
        "example": "gpt2_small",
        **surroundings,
        "options": options.to_dict(),
        "parameters": parameter_count(options, text),
        "data": {
            "description": corpus.description,
            "split": corpus.split,
            "sha256": corpus.digest(),
            "tokenizer": text.description,
            "vocabulary": text.vocabulary,
            "training_files": len(corpus.training),
            "training_tokens": len(text.training),
            "held_out_files": len(corpus.held_out),
            "held_out_tokens": len(text.held_out),
        },
    }


def introduce(console: Console, options: Options, content: dict[str, Any]) -> None:
    """Says what is about to happen.

    Args:
        console: Where to say it.
        options: The flags.
        content: What the JSON file says beside the runs.
    """
    data, hardware = content["data"], content["hardware"]
    rule = ""
    if options.base != ADAMW:
        rule = f", base rule {BASES[options.base]} at {options.muon_learning_rate:g}"
    console.print(
        f"GPT-2 {options.model}, {content['parameters']:,} parameters, {options.precision} on "
        f"{hardware.get('gpu', hardware['processor'])}\n"
        f"Text: {data['description']}; {data['training_tokens']:,} training and "
        f"{data['held_out_tokens']:,} held-out tokens, split {data['split']}\n"
        f"{options.steps} steps of {options.batch} x {options.length} tokens, learning rate "
        f"{options.learning_rate:g} ({options.schedule}), {options.drive}{rule}",
        highlight=False,
    )


def run_seed(
    record: SeedRecord,
    options: Options,
    text: TokenizedText,
    console: Console,
    save_all: Callable[[], None],
) -> None:
    """Runs everything for one seed and fills in its record.

    HybridOptimizer goes first, since the control needs to know how many gradients it used.

    Args:
        record: Takes the runs.
        options: The flags.
        text: What to train on.
        console: Where to show progress.
        save_all: Writes what there is; called after every run, also one that was cut short.
    """

    def new(name: str, steps: int) -> RunRecord:
        base = options.base if name in HYBRIDS else ADAMW
        return RunRecord(name, record.seed, steps, options.batch * options.length, base)

    def run(run_record: RunRecord, evaluate_after: Collection[int] = ()) -> None:
        title = f"Seed {record.seed}: {run_record.title}"
        try:
            with progress(console, title, run_record.planned_steps) as report:
                train(run_record, options, text, evaluate_after=evaluate_after, report=report)
        finally:
            release_memory()
            if run_record is record.baseline and gradients is not None and not options.controls:
                add_free_control(record, options, gradients)
            save_all()

    gradients = None
    if options.only != BASELINE:
        record.hybrid = new(HYBRID, options.steps)
        run(record.hybrid)
        gradients = record.hybrid.gradients
    if options.only == HYBRID:
        return
    record.baseline = new(BASELINE, options.steps)
    run(record.baseline, evaluate_after=() if gradients is None else {gradients})
    if options.controls and gradients is not None:
        record.control = new(CONTROL, gradients)
        record.control_source = "own run"
        run(record.control)
    if options.base != ADAMW:
        record.alone = new(ALONE, options.steps)
        comparable = set()
        if gradients is not None and stops_alike(options, gradients):
            comparable = {gradients}
        run(record.alone, evaluate_after=comparable)


def add_free_control(record: SeedRecord, options: Options, gradients: int) -> None:
    """Takes the control from the baseline on its way, where that is the same thing.

    Args:
        record: Takes the control.
        options: The flags.
        gradients: How many gradients HybridOptimizer used.
    """
    if stops_alike(options, gradients) and record.baseline is not None:
        record.control = record.baseline.stopped_after(gradients)
        record.control_source = "baseline on its way" if record.control else "none"


def stops_alike(options: Options, gradients: int) -> bool:
    """Whether a run of all steps, stopped on its way, is one planned for so few.

    Args:
        options: The flags.
        gradients: After how many gradients it is stopped.
    """
    # With another schedule the learning rate has not decayed yet where it stops.
    return options.schedule == "constant" or gradients == options.steps


def save(
    content: dict[str, Any], records: Sequence[SeedRecord], options: Options, complete: bool
) -> None:
    """Writes the JSON file and the plot.

    Args:
        content: What the JSON file says beside the runs.
        records: The runs so far.
        options: The flags.
        complete: Whether there are no more to come.
    """
    summaries = [seed_summary(record) for record in records]
    write_json(
        options.output / "results.json", {**content, "complete": complete, "seeds": summaries}
    )
    title = f"GPT-2 {options.model}, {options.batch} x {options.length} tokens a gradient"
    if options.base != ADAMW:
        title += f", base rule {BASES[options.base]}"
    write_plot(options.output / "loss.png", records, title)


if __name__ == "__main__":
    raise SystemExit(main())
