"""The plot of a soak run: what it measured, over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.files import save_figure
from soak.measure import SETTLED, Sample, settled_legs

KIBIBYTE, MEBIBYTE = 2**10, 2**20
# One is drawn around the other: where nothing grows they lie on one point.
MARKERS: dict[str, dict[str, Any]] = {
    "inline": {"color": "tab:purple", "marker": "o", "ms": 6, "fillstyle": "none"},
    "stepped": {"color": "tab:green", "marker": ".", "ms": 3},
}
PANELS = (
    ("device_bytes", "device bytes, KiB", KIBIBYTE),
    ("tensors", "live tensors", 1),
    ("state_bytes", "state in stats(), KiB", KIBIBYTE),
)


def write_plot(
    path: Path, samples: Sequence[Sample], control: Sequence[Sample], allowed: int
) -> None:
    """Draws bytes, tensors, state and resident memory over the steps, as a PNG file.

    There may be no samples of the control. Resident memory may grow by so many bytes.
    """
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    for axis, (quantity, text, unit) in zip(axes, PANELS, strict=False):
        for drive, marker in MARKERS.items():
            chosen = [sample for sample in samples if sample.drive == drive]
            values = [getattr(sample, quantity) / unit for sample in chosen]
            axis.plot([x.step for x in chosen], values, ls="", label=drive, **marker)
        axis.set_ylabel(text)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="lower right", fontsize="small")
    _draw_resident(axes[-1], samples, control, allowed)
    axes[-1].set_xlabel("steps")
    for axis in axes:
        axis.grid(alpha=0.25)
    for number, (name, leg) in enumerate(groupby(samples, key=lambda sample: sample.leg)):
        first = next(leg).step
        axes[0].text(first, 0.04, f" {name}", transform=axes[0].get_xaxis_transform())
        for axis in axes if number else ():
            axis.axvline(first, color="0.7", lw=0.8)
    figure.suptitle("Memory of a soak run, sampled with no gradient alive")
    save_figure(path, figure, 100)


def _draw_resident(
    axis: Any, samples: Sequence[Sample], control: Sequence[Sample], allowed: int
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
