"""Sections of ``--train``: whole runs of GPT-2 on text, each kept as soon as it has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import three_configurations
from gpu.context import Context, OutOfTimeError
from gpu.timing import spread
from lib import configurations_report as report
from lib.gpt2_options import QUICK, Options, resolved
from lib.gpt2_records import ADAMW, ALONE, BASELINE, HYBRID, MUON, RecordStore, RunRecord
from lib.gpt2_training import prepare, train
from triton_hybrid import HybridConfig

SEEDS = (0, 1, 2)
SLOWER, RECENT = 1.3, 5  # than the slowest of the last few a run may be: the first ones compile
# On the CPU, for tests: text that is there and short, and a model to match.
LIB = Path(__file__).resolve().parents[2] / "lib"
TINY: dict[str, Any] = {"model": "tiny", "batch": 4, "length": 16, "vocabulary": 300, "steps": 20}
TINY |= {"held_out_windows": 4, "threads": 1, "data": (LIB,)}
SOURCE: dict[str, Any] = {"model": "small", "offload": "pinned"}
LARGE: dict[str, Any] = {"model": "small", "batch": 16, "length": 1024, "steps": 60}
LARGE |= {"precision": "bf16", "schedule": "linear", "drive": "inline", "hybrid": HybridConfig()}
CONTENDERS: dict[str, tuple[str, str]] = {
    "AdamW fused": (BASELINE, ADAMW), "hybrid none": (ALONE, ADAMW),
    "hybrid": (HYBRID, ADAMW), "hybrid on Muon": (HYBRID, MUON),
}  # fmt: skip
"""Which run of `train` each is, and its base rule."""


class Kept(RecordStore):
    """Finished runs, each told; asked for one that is not there, it looks at the time first.

    Args:
        context: Whom it tells, and how much time there is.
        content: What `prepare` says of surroundings and text.
        planned: Seeds and names of the runs, in their order.
    """

    def __init__(
        self, context: Context, content: Mapping[str, Any], planned: Sequence[tuple[int, str]]
    ) -> None:
        surroundings = {name: content[name] for name in ("hardware", "versions", "data")}
        super().__init__(context.folder / "finished.jsonl", surroundings)
        self._context, self._left = context, list(planned)
        self._taken: list[float] = []  # seconds of each run
        self._before = context.left
        self.runs: list[RunRecord] = []

    def get(self, key: Mapping[str, Any]) -> RunRecord | None:
        """A run; None if it is to be done, and there is time.

        Raises:
            OutOfTimeError: There is not.
        """
        self._before = self._context.left
        found = super().get(key)
        if found is None and self._before < SLOWER * max(self._taken[-RECENT:], default=0.0):
            raise OutOfTimeError
        return found if found is None else self._tell(found, kept=True)

    def add(self, key: Mapping[str, Any], run: RunRecord) -> RunRecord:
        """Keeps a run."""
        self._taken.append(self._before - self._context.left)
        return self._tell(super().add(key, run), kept=False)

    def _tell(self, run: RunRecord, kept: bool) -> RunRecord:
        self.runs.append(run)
        _, name = self._left.pop(0)
        gradients, predicted = run.gradients, run.statistic("predicted_steps")
        counts = {"gradients": gradients, "predicted": predicted}
        counts["rollbacks"] = run.statistic("rollbacks")
        times = {"seconds": run.seconds, "ms_a_step": spread([1e3 * x.seconds for x in run.steps])}
        losses = {"training_loss": run.final_loss, "held_out": run.held_out_end}
        memory = {"peak_MiB": run.memory_peak >> 20, "from_before": kept}
        rate = {"tokens_a_second": run.tokens_per_second}
        self._context.row(run=name, seed=run.seed, **counts, **times, **rate, **losses, **memory)
        return run

    def follow(self, run: RunRecord) -> None:
        """Called after every step of a run; ends one whose time is up."""
        self._context.check_time()

    def leave_out(self) -> None:
        """Tells what was planned and not done."""
        for seed, name in self._left:
            self._context.skip(f"{name}, seed {seed}", "no time was left")


def source(context: Context) -> None:
    """The configurations of `three_configurations.py` with their controls, seed by seed."""
    settings = SOURCE if context.on_gpu else {**TINY, "offload": "cpu"}
    seeds = SEEDS if context.on_gpu else SEEDS[:1]
    flags: list[str] = ["--seeds", *map(str, seeds), "--output", str(context.folder)]
    flags += ["--device", context.device.type, "--baseline-impl", "fused"]
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    plan = three_configurations.parse_options(flags)
    text, content = prepare("three_configurations", plan.base)
    orders = [three_configurations.order(index) for index in range(len(seeds))]
    planned = [(seed, report.TITLES[x]) for seed, names in zip(seeds, orders) for x in names]
    store = Kept(context, content, planned)
    content |= {"options": plan.base.to_dict(), "seeds": seeds}

    def runs() -> None:
        for names, seed in zip(orders, seeds):
            three_configurations.run_seed(names, seed, plan, text, store, Console(stderr=True))

    def told() -> None:
        complete = len(store.runs) == len(planned)
        path = context.folder / "three_configurations.json"
        report.write_results(path, content, store.runs, complete)
        whole = report.complete_seeds(store.runs)
        for found in report.comparisons(whole) if whole[BASELINE] else ():
            names = {name: found[name] for name in ("configuration", "reference")}
            estimates = ("speed_up_wall_clock", "held_out_percent_above")
            parts = ("mean", "low", "high")
            cells = {name: {x: getattr(found[name], x) for x in parts} for name in estimates}
            context.row(**names, **cells)

    within_time(store, runs, told)


def within_time(
    store: Kept, runs: Callable[[], None], told: Callable[[], None] = lambda: None
) -> None:
    """Makes runs for as long as there is time, and tells what came out and what is left out."""
    try:
        runs()
    finally:
        told()
        store.leave_out()


def large(context: Context) -> None:
    """Many tokens a step: AdamW, and HybridOptimizer without predictions, with, and on Muon."""
    settings = LARGE if context.on_gpu else {**LARGE, **TINY, "hybrid": QUICK}
    seeds = SEEDS if context.on_gpu else SEEDS[:1]
    common: dict[str, Any] = {**settings, "output": context.folder, "device": context.device}
    common["baseline_implementation"] = "fused"
    chosen = {base: resolved(Options(**common, base=base)) for base in (ADAMW, MUON)}
    text, content = prepare("gpu_train", chosen[ADAMW])
    store = Kept(context, content, [(seed, name) for seed in seeds for name in CONTENDERS])

    def runs() -> None:
        for seed in seeds:
            for name, base in CONTENDERS.values():
                options = chosen[base]
                key = {**options.to_dict(), "name": name, "seed": seed}
                if store.get(key) is None:
                    run = RunRecord(name, seed, options.steps, options.batch * options.length, base)
                    train(run, options, text, report=store.follow)
                    store.add(key, run)

    within_time(store, runs)
