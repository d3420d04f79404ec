"""What the example leaves behind: a JSON file with everything, and a plot of the loss."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_records import ALONE, BASELINE, CONTROL, HYBRID, RunRecord, SeedRecord
from text_data import write_atomically

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "triton_hybrid")
RUN_COLOURS = {BASELINE: "0.45", ALONE: "tab:cyan", HYBRID: "tab:purple", CONTROL: "black"}
PHASE_COLOURS = {
    "warmup": "tab:orange",
    "full": "tab:blue",
    "predict": "tab:green",
    "correct": "tab:red",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Describes the hardware and the versions a run depends on.

    Args:
        device: Where it runs.
    """
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
        hardware["gpu_capability"] = f"{properties.major}.{properties.minor}"
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["cuda"] = torch.version.cuda
    versions["hip"] = torch.version.hip
    return {
        "hardware": hardware,
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def seed_summary(record: SeedRecord) -> dict[str, Any]:
    """Returns everything about the runs from one seed, for JSON."""
    return {
        "seed": record.seed,
        "speed_up_wall_clock": record.speed_up,
        "held_out_percent_above_baseline": record.against_baseline,
        "held_out_percent_above_control": record.against_control,
        "control_source": record.control_source,
        "held_out_percent_above_base_alone": record.against_alone,
        "held_out_percent_above_base_alone_as_many_gradients": record.against_alone_on_its_way,
        "runs": {run.name: _run_summary(run) for run in record.runs},
    }


def _run_summary(run: RunRecord) -> dict[str, Any]:
    return {
        "optimizer": run.optimizer,
        "base": run.base,
        "complete": run.complete,
        "planned_steps": run.planned_steps,
        "steps_taken": len(run.steps),
        "gradient_evaluations": run.gradients,
        "seconds": run.seconds,
        "mean_step_seconds_by_phase": {
            phase: sum(seconds) / len(seconds) for phase, seconds in run.seconds_by_phase().items()
        },
        "tokens_per_second": run.tokens_per_second,
        "memory_before_bytes": run.memory_before,
        "memory_peak_bytes": run.memory_peak,
        "training_loss_first": run.losses[0] if run.losses else None,
        "training_loss_final_mean": run.final_loss,
        "held_out_loss_start": run.held_out_start,
        "held_out_loss_end": run.held_out_end,
        "held_out_loss_after_gradients": run.held_out_after,
        "stats": run.stats,
        "steps": [dataclasses.asdict(step) for step in run.steps],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON that every reader accepts, whole or not at all.

    Args:
        path: The file.
        content: What goes in.
    """
    write_atomically(path, json.dumps(_strict(content), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """Turns what JSON has no word for, such as NaN, into text."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write_plot(path: Path, records: Sequence[SeedRecord], title: str) -> None:
    """Draws training loss against gradient evaluations and against time, a row for each seed.

    Args:
        path: The PNG file.
        records: The runs.
        title: Heading of the whole figure.
    """
    figure = Figure(figsize=(13, 1 + 4 * len(records)), layout="constrained")
    grid = figure.subplots(len(records), 2, squeeze=False, sharey="row")
    for axes, record in zip(grid, records, strict=True):
        for axis, by_time in zip(axes, (False, True), strict=True):
            for run in record.runs:
                _draw_run(axis, run, by_time)
            axis.set_xlabel("seconds of training" if by_time else "gradient evaluations")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel(f"loss, seed {record.seed}")
        axes[1].legend(fontsize="small")
    figure.suptitle(title)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)


def _draw_run(axis: Axes, run: RunRecord, by_time: bool) -> None:
    positions: list[float] = []
    spans: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASE_COLOURS}
    elapsed = 0.0
    for step in run.steps:
        if step.phase in spans:
            spans[step.phase].append((elapsed, step.seconds))
        elapsed += step.seconds
        positions.append(elapsed if by_time else step.gradients)
    measured = [
        (position, step.loss, step.phase)
        for position, step in zip(positions, run.steps, strict=True)
        if step.loss is not None
    ]
    x = [position for position, _, _ in measured]
    y = [loss for _, loss, _ in measured]
    name = run.title
    if run.name == HYBRID:
        bottom = axis.get_xaxis_transform()
        for phase, colour in PHASE_COLOURS.items():
            label = phase.capitalize()
            if by_time:
                axis.broken_barh(
                    spans[phase],
                    (0, 1),
                    transform=bottom,
                    facecolors=colour,
                    alpha=0.18,
                    label=label,
                )
        predicted = [p for p, step in zip(positions, run.steps, strict=True) if step.loss is None]
        if not by_time:
            # They take no gradient, so here they have no width.
            axis.plot(
                predicted,
                [0.01] * len(predicted),
                transform=bottom,
                marker="|",
                ls="",
                color=PHASE_COLOURS["predict"],
                label="Predict",
            )
        axis.plot(x, y, color="0.2", lw=0.8, alpha=0.7)
        colours = [PHASE_COLOURS[phase] for _, _, phase in measured]
        axis.scatter(x, y, s=14, c=colours, zorder=3, label=name)
    elif run.name in (BASELINE, ALONE):
        axis.plot(x, y, color=RUN_COLOURS[run.name], lw=1.2, label=name)
    if run.held_out_end is not None and positions:
        axis.plot(
            positions[-1],
            run.held_out_end,
            marker="*",
            ms=11,
            ls="",
            color=RUN_COLOURS[run.name],
            mec="white",
            label=f"{name}: held-out {run.held_out_end:.3f}",
        )
