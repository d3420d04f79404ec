"""The plot of a soak run: what it measured, over its steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from soak_measure import SETTLED, Sample, settled_legs

KIBIBYTE, MEBIBYTE = 2**10, 2**20
# One is drawn around the other: where nothing grows they lie on one point.
MARKERS = {
    "inline": {"color": "tab:purple", "marker": "o", "ms": 6, "fillstyle": "none"},
    "stepped": {"color": "tab:green", "marker": ".", "ms": 3},
}


def write_plot(
    path: Path, samples: Sequence[Sample], control: Sequence[Sample], allowed: int
) -> None:
    """Draws bytes, tensors, state and resident memory over the steps.

    Args:
        path: The PNG file.
        samples: Of the run.
        control: Of torch's AdamW; may be empty.
        allowed: By how many bytes resident memory may grow.
    """
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    panels: list[tuple[str, Callable[[Sample], float]]] = [
        ("device bytes, KiB", lambda sample: sample.device_bytes / KIBIBYTE),
        ("live tensors", lambda sample: sample.tensors),
        ("state in stats(), KiB", lambda sample: sample.state_bytes / KIBIBYTE),
    ]
    for axis, (label, value) in zip(axes, panels, strict=False):
        for drive, marker in MARKERS.items():
            chosen = [sample for sample in samples if sample.drive == drive]
            axis.plot(
                [sample.step for sample in chosen],
                [value(sample) for sample in chosen],
                ls="",
                label=drive,
                **marker,
            )
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="lower right", fontsize="small")
    _draw_resident(axes[-1], samples, control, allowed)
    axes[-1].set_xlabel("steps")
    for axis in axes:
        axis.grid(alpha=0.25)
        _mark_legs(axis, samples)
    for name, leg in _legs(samples):
        axes[0].text(leg[0].step, 0.04, f" {name}", transform=axes[0].get_xaxis_transform())
    figure.suptitle("Memory of a soak run, sampled with no gradient alive")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, path)


def _draw_resident(
    axis: Axes, samples: Sequence[Sample], control: Sequence[Sample], allowed: int
) -> None:
    for run, label, colour in (
        (control, "torch.optim.AdamW, a process of its own", "0.55"),
        (samples, "HybridOptimizer" if control else "this run", "tab:blue"),
    ):
        steps, grown, before = [], [], 0
        for leg in settled_legs(run):
            start = leg[0].resident_bytes
            steps += [sample.step for sample in leg]
            grown += [(before + sample.resident_bytes - start) / MEBIBYTE for sample in leg]
            before += leg[-1].resident_bytes - start
        axis.plot(steps, grown, color=colour, lw=1.2, label=label)
    axis.axhline(allowed / MEBIBYTE, color="tab:red", ls="--", lw=1, label="allowed growth")
    axis.set_ylabel(f"resident memory, MiB more\nthan at step {SETTLED} of each leg")
    axis.legend(loc="upper left", fontsize="small")


def _legs(samples: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    return [(name, list(leg)) for name, leg in groupby(samples, key=lambda s: s.leg)]


def _mark_legs(axis: Axes, samples: Sequence[Sample]) -> None:
    for _, leg in _legs(samples)[1:]:
        axis.axvline(leg[0].step, color="0.7", lw=0.8)
