"""Recorded runs once more with the code of today: do the figures that rest on them still stand?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from frontier.judge import final_loss, grouped
from frontier.runs import run_all
from frontier.training import RunSpec
from lib.run_store import Line, RunStore
from lib.statistics import estimate_ratio
from lib.tables import cell, figures_table

WHERE = ("data", "hardware", "versions")
"""What differs between machines: other texts give other losses, other processors other bits."""


def select(
    lines: Iterable[Line],
    optimizers: Sequence[str],
    seeds: Sequence[int] | None,
    lrs: Sequence[float] | None,
) -> list[Line]:
    """Returns the recorded runs of some optimizers; of some seeds and rates, where those are given.

    Raises:
        ValueError: There are none.
    """
    found = [
        line
        for line in lines
        if line["optimizer"] in optimizers
        and (seeds is None or line["seed"] in seeds)
        and (lrs is None or line["lr"] in lrs)
    ]
    if not found:
        raise ValueError(f"no recorded run of {list(optimizers)} with seeds {seeds} and lrs {lrs}")
    return found


def run_again(recorded: Sequence[Line], path: Path, workers: int = 1, threads: int = 1) -> Table:
    """Runs what is not in the file yet, and compares final losses, run by run.

    Args:
        recorded: The runs, as they were recorded.
        path: The file of those made again; it is continued.
        workers: Runs at a time.
        threads: Threads of each.

    Returns:
        For each task, optimizer and budget the geometric mean of new losses over recorded ones
        with its 95% interval by Student's t, the lowest and the highest. One processor's bits
        are not another's, so single runs differ; their mean must not.
    """
    names = RunSpec.__dataclass_fields__
    run_all([RunSpec(**{name: line[name] for name in names}) for line in recorded], path,
            workers, threads)  # fmt: skip
    store = RunStore(path)
    headings = "run", "runs", "ratio", "95%", "from", "to"
    table = figures_table("Losses of today, of those recorded", headings)
    for kind, runs in grouped(recorded, _kind).items():
        new = [store.get(line["key"]) or {} for line in runs]
        pairs = [(final_loss(its), final_loss(old)) for its, old in zip(new, runs, strict=True)]
        finite = [a / b for a, b in pairs if a < math.inf and b < math.inf]
        ratio = estimate_ratio(finite)
        lost = sum(a == math.inf > b for a, b in pairs)
        others = (name for name in WHERE for its, old in zip(new, runs, strict=True)
                  if its.get(name) != old.get(name))  # fmt: skip
        kind += "".join(f"\nother {name}" for name in dict.fromkeys(others))
        kind += f"\n{lost} diverge" if lost else ""
        figures = ["-"] * 4
        if ratio is not None:
            ends = (cell(end, "{:.4f}") for end in (ratio.low, ratio.high))
            figures = [f"{ratio.mean:.4f}", " to ".join(ends)]
            figures += [f"{end(finite):.4f}" for end in (min, max)]
        table.add_row(kind, str(len(runs)), *figures)
    return table


def _kind(line: Line) -> str:
    def named(name: str) -> str:
        options = line[f"{name}_options"]
        return f"{line[name]} {json.dumps(options, sort_keys=True)}" if options else line[name]

    return f"{named('task')}, {named('optimizer')}, {line['budget']} gradients"
