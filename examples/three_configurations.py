"""Compares three configurations on GPT-2: AdamW, HybridOptimizer, and that with less memory.

From the same seeds and on the same batches: torch.optim.AdamW in FP32; HybridOptimizer with
HybridConfig.quick_validation(), which is the source's run; and the same with 16-bit parameters,
FP32 masters, accumulated gradients and offloaded state. Beside them two controls: AdamW with
exactly as many gradients as HybridOptimizer used, its learning-rate schedule compressed to them;
and AdamW in 16 bits, which shows what these come to without any prediction. Without flags: the
tiny model, three seeds, under five minutes on a CPU, nothing downloaded. Prints a table with the
source's figures beside these, intervals and t-tests paired by seed, and writes JSON and a plot.
Finished runs are kept in the output folder; the same command goes on from there.

    python examples/three_configurations.py
    python examples/three_configurations.py --model small --seeds 0 1 2 3 4
    python examples/three_configurations.py --precision fp16 --offload pinned
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rich.console import Console
from tyro import conf

from lib import configurations_report as report
from lib import gpt2_options as gpt2
from lib.choices import OFFLOADS
from lib.configurations_report import CONFIGURATIONS, TITLES
from lib.flags import INTERRUPTED, choice, fail, parse, refuse, refuse_others, several_seeds
from lib.gpt2_records import CONTROL, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT, RecordStore, RunRecord
from lib.gpt2_training import follow, prepare, train
from lib.progress import progress
from lib.text_data import TokenizedText
from triton_hybrid import HybridConfig

SIXTEEN_BIT_PARAMETERS = (MEMORY_OPTIMISED, SIXTEEN_BIT)
ALL_ADAMW = "all configurations have AdamW as their rule"
FORBIDDEN = {
    "--seed": "--seeds",
    "--base": ALL_ADAMW,
    "--muon-lr": ALL_ADAMW,
    "--drive": "the drive is stepped, as in the source",
    "--only": "all configurations are run",
    "--controls": "the control is always run",
}
# What a model trains with where nothing is said: steps, learning rate, schedule. The source's own
# run, and for the smallest model one in which AdamW's learning rate is tuned and decays to zero:
# over an AdamW whose rate is too low or never decays, gains are cheap.
SOURCE_PRESET = 50, 6e-4, "constant"
PRESETS = {"tiny": (200, 2e-3, "linear")}


@dataclass(frozen=True, kw_only=True)
class Flags(gpt2.Gpt2Flags):
    """The flags of this example.

    Attributes:
        threads: CPU threads; None: 1 for tiny, which is too small to share, else torch's choice.
        steps: Calls of step() in each run; None: 200 for tiny, else the source's 50.
        learning_rate: Learning rate; None: 0.002 for tiny, where AdamW was tuned, else the
            source's 0.0006.
        schedule: Learning rate over the steps; None: linear for tiny, else the source's constant.
        seeds: Random seeds.
        precision: Parameters of the 16-bit configurations; fp16 comes with dynamic loss scaling.
        accumulation: Micro-batches that these accumulate; a batch is divided, so that every
            configuration has equally many tokens a step.
        offload: Where the memory-optimised one's state lives that AdamW does not have.
    """

    model: Annotated[str, gpt2.MODELS] = "tiny"
    output: Path = Path("runs/three_configurations_MODEL")
    hybrid: Annotated[HybridConfig, gpt2.phase_machine("offload")] = gpt2.QUICK
    steps: Annotated[int | None, gpt2.COUNT] = None
    learning_rate: Annotated[float | None, gpt2.POSITIVE, conf.arg(name="lr")] = None
    schedule: gpt2.Schedule | None = None
    seeds: Annotated[tuple[int, ...], several_seeds()] = (0, 1, 2)
    precision: Literal["bf16", "fp16"] = "bf16"
    accumulation: Annotated[int, gpt2.COUNT] = 4
    offload: Annotated[str, choice(OFFLOADS)] = "cpu"


@dataclass(frozen=True)
class Plan:
    """Everything that the comparison depends on.

    Attributes:
        flags: The flags.
        base: Options of the runs in FP32, with nothing offloaded.
    """

    flags: Flags
    base: gpt2.Options

    def options(self, configuration: str) -> gpt2.Options:
        """Returns the options of one configuration's runs."""
        if configuration not in SIXTEEN_BIT_PARAMETERS:
            return self.base
        predicts = configuration == MEMORY_OPTIMISED
        change: Any = {"offload": self.flags.offload} if predicts else {"predictor": "none"}
        config = replace(self.base.hybrid, **change)
        return replace(self.base, precision=self.flags.precision, hybrid=config)

    def windows(self, configuration: str) -> dict[str, Any]:
        """Returns the parts that each batch is divided into, and the loss scaling."""
        if configuration not in SIXTEEN_BIT_PARAMETERS:
            return {"micro_batches": 1, "loss_scale": None}
        # Only FP16 underflows without.
        scale = "dynamic" if self.flags.precision == "fp16" else None
        return {"micro_batches": self.flags.accumulation, "loss_scale": scale}

    def settings(self, configuration: str) -> dict[str, Any]:
        """Returns what decides a configuration's runs, beside their seeds."""
        return {**self.options(configuration).to_dict(), **self.windows(configuration)}

    def key(self, configuration: str, seed: int, steps: int) -> dict[str, Any]:
        """Returns what decides a run, beside its surroundings."""
        own = {"name": configuration, "seed": seed, "steps": steps}
        return {**self.settings(configuration), **own}


def parse_options(arguments: Sequence[str] | None = None) -> Plan:
    """Reads the command line; a bad flag ends the program with a message that names it."""
    refuse_others(sys.argv[1:] if arguments is None else arguments, FORBIDDEN)
    flags: Flags = parse(Flags, arguments, description=__doc__)
    steps, rate, schedule = PRESETS.get(flags.model, SOURCE_PRESET)
    base = gpt2.options_of(
        flags,
        steps=flags.steps or steps,
        learning_rate=flags.learning_rate or rate,
        schedule=flags.schedule or schedule,
        threads=flags.threads or (1 if flags.model == "tiny" else None),
        precision="fp32",
        accumulation=1,  # here the batch itself is divided
    )
    if base.batch % flags.accumulation:
        divisors = ", ".join(str(n) for n in range(1, base.batch + 1) if base.batch % n == 0)
        allowed = f"{divisors}, which divide --batch {base.batch}"
        refuse("--accumulation", flags.accumulation, allowed)
    return Plan(flags, base)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison with some flags, or those of this process; returns the exit status."""
    plan = parse_options(arguments)
    base, flags = plan.base, plan.flags
    console = Console()
    runs: list[RunRecord] = []
    title = f"GPT-2 {base.model}, {base.steps} steps of {base.batch} x {base.length} tokens"
    interrupted = False
    try:
        text, content = prepare("three_configurations", base)
        content["options"] = {**base.to_dict(), "seeds": flags.seeds}
        content["configurations"] = {name: plan.settings(name) for name in CONFIGURATIONS}
        content["seeds"] = flags.seeds
        content["statistics"] = f"scipy {metadata.version('scipy')}"
        # Times of other machines do not mix.
        surroundings = {name: content[name] for name in ("hardware", "versions", "data")}
        store = RecordStore(base.output / "finished.jsonl", surroundings)
        for index, seed in enumerate(flags.seeds):
            runs += run_seed(order(index), seed, plan, text, store, console)
            complete = index + 1 == len(flags.seeds)
            report.write_results(base.output / "results.json", content, runs, complete)
            seeds = ", ".join(map(str, flags.seeds))
            report.write_plot(base.output / "plot.png", runs, f"{title}, seeds {seeds}")
    except KeyboardInterrupt:
        interrupted = True
    except NotImplementedError as error:
        fail(error)
    sixteen_bit = (
        f"16-bit: {flags.precision.upper()} parameters, FP32 masters, {flags.accumulation} "
        f"micro-batches; memory-optimised: offload {flags.offload} too"
    )
    report.print_tables(console, runs, (title, sixteen_bit), on_cpu=base.device.type == "cpu")
    if interrupted:
        console.print("Interrupted; the same command goes on from here.")
        return INTERRUPTED
    console.print(f"Results: {base.output}", highlight=False, soft_wrap=True)
    return 0


def order(index: int) -> list[str]:
    """Returns the order in which the configurations of the index-th seed run.

    It rotates from seed to seed, so that none of them always runs first; the control, which
    needs to know how many gradients HybridOptimizer used, is always last.
    """
    first = [name for name in CONFIGURATIONS if name != CONTROL]
    start = index % len(first)
    return [*first[start:], *first[:start], CONTROL]


def run_seed(
    configurations: Sequence[str],
    seed: int,
    plan: Plan,
    text: TokenizedText,
    store: RecordStore,
    console: Console,
) -> list[RunRecord]:
    """Runs every configuration from one seed, except those that are finished."""
    done: dict[str, RunRecord] = {}
    for configuration in configurations:
        steps = done[HYBRID].gradients if configuration == CONTROL else plan.base.steps
        key = plan.key(configuration, seed, steps)
        run = store.get(key)
        title = f"Seed {seed}: {TITLES[configuration]}"
        if run is not None:
            console.print(f"{title}: kept from before", highlight=False)
        else:
            with progress(console, steps, "steps") as show:
                after_step = follow(show, title)
                run = run_configuration(configuration, seed, steps, plan, text, after_step)
            run = store.add(key, run)
        done[configuration] = run
    return list(done.values())


def run_configuration(
    configuration: str,
    seed: int,
    steps: int,
    plan: Plan,
    text: TokenizedText,
    after_step: Callable[[RunRecord], None] = lambda record: None,
) -> RunRecord:
    """Trains once; a loss at the end that could not be compared ends the program."""
    options = plan.options(configuration)
    record = RunRecord(configuration, seed, steps, options.batch * options.length)
    train(record, options, text, report=after_step, **plan.windows(configuration))
    if record.held_out_end is None or not math.isfinite(record.held_out_end):
        fail(
            f"{configuration}, seed {seed}: the held-out loss after {steps} steps is "
            f"{record.held_out_end}, not a finite number; a lower --lr may help"
        )
    return record


if __name__ == "__main__":
    raise SystemExit(main())
