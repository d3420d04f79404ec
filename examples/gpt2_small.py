"""Trains GPT-2 small twice, with AdamW and with HybridOptimizer, and compares the two.

Both start from the same random weights and see the same batches; HybridOptimizer predicts some of
its steps instead of computing a gradient for them. Without flags: 50 steps of 4 x 64 tokens of
real text at a learning rate of 6e-4; nothing is downloaded. Prints a table of both, and of AdamW
stopped after as many gradients as HybridOptimizer used, and writes the same as JSON beside a plot
of the loss. With --base muon there is a third run: Muon without prediction, to tell the rule's
share from prediction's. With --to-loss the held-out loss is measured after every gradient, and the
table counts the gradients and seconds that each run needs for AdamW's final one. With
--accumulation 4 every gradient is a mean over 4 batches; with --adaptive, HybridOptimizer takes as
many of them as the noise asks for, and the plot shows it.

Under torchrun (gloo on CPUs, NCCL on GPUs) the processes share each batch: all draw the same one
from the seed and each takes its part, under DistributedDataParallel. So weights at the start, order
of batches, tokens a step and held-out text are those of one process, and losses differ by rounding
alone; dropout, if any, is each process's own. The first process shows and writes results; it then
runs the same by itself, for the table.

    python examples/gpt2_small.py
    python examples/gpt2_small.py --model tiny --steps 200 --seeds 0 1 2
    python examples/gpt2_small.py --base muon --to-loss
    python examples/gpt2_small.py --accumulation 4 --adaptive
    torchrun --nproc-per-node 2 examples/gpt2_small.py
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from tyro import conf

from lib.files import write_json
from lib.flags import INTERRUPTED, LARGEST_SEED, parse, refuse, several_seeds, whole_number
from lib.gpt2_options import Options, resolved
from lib.gpt2_records import (
    ADAMW,
    ALONE,
    BASELINE,
    BASES,
    CONTROL,
    HYBRID,
    HYBRIDS,
    ONE_PROCESS,
    RunRecord,
)
from lib.gpt2_report import (
    SeedRecord,
    result_table,
    seeds_table,
    title_of,
    to_loss_table,
    write_plot,
)
from lib.gpt2_training import follow, prepare, train
from lib.processes import ALONE as THIS_PROCESS
from lib.processes import Processes
from lib.progress import progress
from lib.text_data import TokenizedText

ONE_OF = conf.create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """The flags of this example.

    Attributes:
        seed: Random seed.
        seeds: Several seeds, one by one.
        only: Leave the other run out.
        controls: Train AdamW for exactly as many gradients as HybridOptimizer used in a run of
            its own, its schedule compressed to it; without this the control is the baseline on
            its way, which is the same thing for a constant learning rate.
        to_loss: Measure the held-out loss after every gradient (on a CPU this takes several times
            as long as training; --held-out-windows makes it shorter), and count the gradients and
            seconds of training until it is no higher than AdamW's lowest.
    """

    seed: Annotated[int, whole_number(0, LARGEST_SEED), ONE_OF] = 0
    seeds: Annotated[tuple[int, ...], several_seeds(), ONE_OF] = ()
    only: Literal["baseline", "hybrid"] | None = None
    controls: bool = False
    to_loss: bool = False

    def of_process(self, processes: Processes) -> Flags:
        """The flags with a process's own device; what cannot be shared ends the program."""
        if self.batch % processes.count:
            refuse("--batch", self.batch, f"multiples of {processes.count}, the processes")
        if not processes.several or self.device.type != "cuda":
            return self
        if processes.local >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()}, the GPUs, or --device cpu"
            refuse("--nproc-per-node", processes.local + 1, f"up to {found}")
        return replace(self, device=torch.device("cuda", processes.local))


def parse_options(arguments: Sequence[str] | None = None) -> Flags:
    """Reads the command line; a bad flag ends the program with a message that names it."""
    flags: Flags = parse(Flags, arguments, description=__doc__)
    if flags.controls and flags.only:
        refuse("--controls", f"with --only {flags.only} it", "without --only: it is a comparison")
    if flags.to_loss and (flags.only or flags.schedule != "constant"):
        given = f"--only {flags.only}" if flags.only else f"--schedule {flags.schedule}"
        allowed = "with both runs, and a constant rate: runs are compared on their way"
        refuse("--to-loss", f"with {given} it", allowed)
    return resolved(replace(flags, seeds=flags.seeds or (flags.seed,)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example with some flags, or those of this process, and returns the exit status."""
    processes = Processes.started()
    options = parse_options(arguments).of_process(processes)
    with processes.connected(options.device):
        return run_all(options, processes)


def run_all(options: Flags, processes: Processes) -> int:
    """Runs everything; returns the exit status. The first of several processes shows it."""
    console = Console(quiet=not processes.first)
    options = replace(options, output=Path(processes.said_by_first(str(options.output))))
    records: list[SeedRecord] = []
    interrupted = False
    try:
        with processes.first_before_others():  # they find the tokenizer that it has made
            text, content = prepare("gpt2_small", options)
        content["options"] = options.to_dict()
        content["processes"] = processes.count
        introduce(console, options, content)
        for seed in options.seeds:
            records.append(SeedRecord(seed))
            try:
                run_seed(records, options, text, console, content, processes)
            finally:
                if any(run.steps for run in records[-1].runs.values()):
                    console.print(result_table(records[-1], options.device))
        if processes.first:
            save(content, records, options, complete=True)
    except KeyboardInterrupt:
        interrupted = True
    if len(records) > 1:
        console.print(seeds_table(records))
        if options.to_loss:
            console.print(to_loss_table(records))
    compared = any({HYBRID, BASELINE} <= x.runs.keys() and CONTROL not in x.runs for x in records)
    if compared and not interrupted:
        console.print("AdamW with as many gradients, its schedule compressed to them: --controls")
    if records:
        console.print(f"Results: {options.output}", highlight=False, soft_wrap=True)
    if interrupted:
        console.print("Interrupted; this is what was done until then.")
    return INTERRUPTED if interrupted else 0


def introduce(console: Console, options: Options, content: dict[str, Any]) -> None:
    """Says what is about to happen."""
    data, hardware = content["data"], content["hardware"]
    rate = options.muon_learning_rate
    rule = "" if rate is None else f", base rule {BASES[options.base]} at {rate:g}"
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
    records: Sequence[SeedRecord],
    options: Flags,
    text: TokenizedText,
    console: Console,
    content: dict[str, Any],
    processes: Processes,
) -> None:
    """Runs everything for one seed; files are written after every run, also one cut short.

    HybridOptimizer goes first, since the control needs to know how many gradients it used.

    Args:
        records: Of all seeds so far; the last takes the runs.
        options: The flags.
        text: What to train on.
        console: Where to show progress.
        content: What the JSON file says beside the runs.
        processes: Which share each batch.
    """
    record = records[-1]

    def run(
        name: str, steps: int, evaluate_after: Collection[int] = (), who: Processes = processes
    ) -> RunRecord:
        base = options.base if name in HYBRIDS else ADAMW
        found = RunRecord(name, record.seed, steps, options.batch * options.length, base)
        title = f"Seed {record.seed}: {title_of(record.add(found))}"
        try:
            with progress(console, steps, "steps") as show:
                report = follow(show, title)
                every = range(1, steps + 1) if options.to_loss else evaluate_after
                train(found, options, text, evaluate_after=every, report=report, processes=who)
        finally:
            if name == BASELINE and gradients is not None and not options.controls and stops_alike:
                control = found.stopped_after(gradients)
                if control is not None:
                    record.control_source = "baseline on its way"
                    record.add(control)
            if processes.first:
                save(content, records, options, complete=False)
        return found

    gradients, stops_alike = None, False
    if options.only != BASELINE:
        gradients = run(HYBRID, options.steps).gradients
        # A run of all steps, stopped on its way, is one planned for so few, unless its learning
        # rate has not decayed yet where it stops.
        stops_alike = options.schedule == "constant" or gradients == options.steps
    if options.only != HYBRID:
        run(BASELINE, options.steps, () if gradients is None else {gradients})
    if options.controls and gradients is not None:
        record.control_source = "own run"
        run(CONTROL, gradients)
    if options.base != ADAMW and options.only != HYBRID:
        run(ALONE, options.steps, {gradients} if gradients is not None and stops_alike else ())
    if processes.several:
        if processes.first:
            for name in [name for name in ONE_PROCESS if name in record.runs]:
                run(ONE_PROCESS[name], options.steps, who=THIS_PROCESS)
        processes.wait()


def save(
    content: dict[str, Any], records: Sequence[SeedRecord], options: Options, complete: bool
) -> None:
    """Writes the JSON file and the plot of the runs so far; `complete`: no more are to come."""
    seeds = [record.to_dict() for record in records]
    path = options.output / "results.json"
    write_json(path, {**content, "complete": complete, "seeds": seeds})
    title = f"GPT-2 {options.model}, {options.batch} x {options.length} tokens a gradient"
    if options.base != ADAMW:
        title += f", base rule {BASES[options.base]}"
    write_plot(options.output / "loss.png", records, title)


if __name__ == "__main__":
    raise SystemExit(main())
