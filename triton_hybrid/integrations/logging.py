"""``optimizer.stats()`` into TensorBoard, CSV files, Weights & Biases, and a plot of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from triton_hybrid.integrations.wrappers import unwrap
from triton_hybrid.phases import PHASES
from triton_hybrid.stats import HybridStats

PREFIX = "hybrid/"


def as_dict(source: Any, prefix: str = PREFIX) -> dict[str, float | str]:
    """A flat dictionary, as ``wandb.log`` takes it.

    Args:
        source: A HybridOptimizer, a wrapper of one, or a HybridStats.
        prefix: Before each name.

    Returns:
        Numbers, and the predictor's name. ``acceptance_rate`` is left out before the first
        verification. ``noise`` is the share of the squared gradient that is not signal.
    """
    stats = source if isinstance(source, HybridStats) else unwrap(source).stats()
    flat: dict[str, float | str] = {}
    for name, value in stats.to_dict().items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, entry in parts:
            if not isinstance(entry, (bool, int, float, str)):
                continue
            if isinstance(entry, str) or not math.isnan(entry):
                flat[f"{prefix}{name}{'/' if part else ''}{part}"] = entry
    flat[f"{prefix}noise"] = 1.0 - stats.signal
    return flat


def to_tensorboard(writer: Any, source: Any, step: int, prefix: str = PREFIX) -> None:
    """Writes every number to a ``SummaryWriter``; arguments as in `as_dict`."""
    for name, value in as_dict(source, prefix).items():
        if not isinstance(value, str):
            writer.add_scalar(name, value, step)


def to_csv(path: str | Path, source: Any, step: int, **values: float) -> None:
    """Appends a row to a CSV file, which it makes if need be.

    Args:
        path: The file.
        source: As in `as_dict`.
        step: Whatever the loop counts.
        values: Further columns, such as ``loss=``; the same in every call.

    Raises:
        ValueError: The file has other columns.
    """
    # What comes later must have its column in the first row.
    first = dict.fromkeys(("acceptance_rate",), "")
    row = {"step": step, **values, **first, **as_dict(source, prefix="")}
    names, path = list(row), Path(path)
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            known = next(csv.reader(file))
        if known != names:
            differs = sorted(set(known) ^ set(names)) or "their order"
            raise ValueError(f"path={str(path)!r}: has other columns ({differs})")
    else:
        path.write_text(",".join(names) + "\n", encoding="utf-8")
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(row.values())


def plot_run(run: str | Path | Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draws a run: loss, share of each phase, acceptance, noise and confidence, over steps.

    Args:
        run: A file that `to_csv` wrote, or its rows; ``loss`` is drawn where it is a column.
        path: The picture; its suffix says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are fewer than two rows.
    """
    # Loaded here: whoever only logs needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if isinstance(run, (str, Path)):
        with Path(run).open(newline="", encoding="utf-8") as file:
            rows: list[Mapping[str, Any]] = list(csv.DictReader(file))
    else:
        rows = list(run)
    if len(rows) < 2:
        raise ValueError(f"run has {len(rows)} rows: must have at least 2")
    steps = _column(rows, "step")
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    loss, phases, acceptance, noise = figure.subplots(4, sharex=True)
    loss.plot(steps, _column(rows, "loss"))
    loss.set_ylabel("loss")
    counts = [_column(rows, f"steps_per_phase/{phase.value}") for phase in PHASES]
    since = [[b - a for a, b in zip([0.0, *c], c)] for c in counts]
    totals = [max(sum(parts), 1.0) for parts in zip(*since)]
    shares = [[part / total for part, total in zip(parts, totals)] for parts in since]
    phases.stackplot(steps, *shares, labels=[phase.value for phase in PHASES])
    phases.set_ylabel("share of steps")
    acceptance.plot(steps, _column(rows, "acceptance_rate"), label="acceptance rate")
    acceptance.plot(steps, _column(rows, "horizon"), label="horizon")
    noise.plot(steps, _column(rows, "noise"), label="noise")
    noise.plot(steps, _column(rows, "confidence"), label="confidence")
    noise.set_xlabel("step")
    for axes in (phases, acceptance, noise):
        axes.legend(loc="upper left", ncols=4, fontsize="small")
    figure.savefig(path)


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """A column as numbers; NaN where there is none."""
    found = (row.get(name, "") for row in rows)
    return [float(value) if value not in ("", None) else math.nan for value in found]
