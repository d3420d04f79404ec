"""One optimizer beside others at the same task, budget and seeds: final losses in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frontier.judge import final_loss, grouped
from frontier.report import distinct, format_estimate
from lib.files import write_json
from lib.run_store import Line
from lib.statistics import estimate


def paired_losses(lines: Iterable[Line], optimizer: str) -> list[dict[str, Any]]:
    """Compares an optimizer's runs with all others of the same task, budget and seeds.

    Nothing is tuned here: what a run was set to names it, and each setting is a row.

    Args:
        lines: The runs.
        optimizer: The one that is compared; of each task and budget it must have one setting.

    Returns:
        For each task, budget and other setting the mean losses of both and the difference, with
        its 95% interval by Student's t over the seeds that both have; below zero is better.

    Raises:
        ValueError: No runs of it, or several settings where there must be one.
    """
    found = []
    for (task, options, budget), cell in grouped(lines, _cell).items():
        settings = grouped(cell, _setting)
        own = [setting for setting in settings if setting[0] == optimizer]
        if len(own) != 1:
            raise ValueError(
                f"optimizer {optimizer!r}: {len(own)} settings at {task} {options}, budget "
                f"{budget}; must be one"
            )
        ours = {line["seed"]: final_loss(line) for line in settings[own[0]]}
        for setting, runs in settings.items():
            theirs = {line["seed"]: final_loss(line) for line in runs}
            seeds = sorted(ours.keys() & theirs.keys())
            difference = estimate([ours[seed] - theirs[seed] for seed in seeds])
            if setting == own[0] or difference is None:
                continue
            found.append(
                {
                    "task": task,
                    "task_options": json.loads(options),
                    "budget": budget,
                    "seeds": seeds,
                    **{"optimizer": _named(own[0]), "against": _named(setting)},
                    "loss": sum(ours[seed] for seed in seeds) / len(seeds),
                    "loss_against": sum(theirs[seed] for seed in seeds) / len(seeds),
                    "difference": difference.interval(),
                    "differences": difference.values,
                }
            )
    return found


def _cell(line: Line) -> tuple[str, str, int]:
    return line["task"], json.dumps(line["task_options"], sort_keys=True), int(line["budget"])


def _setting(line: Line) -> tuple[str, str, float]:
    return line["optimizer"], json.dumps(line["optimizer_options"], sort_keys=True), line["lr"]


def _named(setting: tuple[str, str, float]) -> dict[str, Any]:
    optimizer, options, lr = setting
    return {"optimizer": optimizer, "optimizer_options": json.loads(options), "lr": lr}


def write_pairs(lines: list[Line], optimizer: str, path: Path) -> None:
    """Writes `paired_losses` as JSON, with the hardware and the versions of the runs."""
    content = {
        "pairs": paired_losses(lines, optimizer),
        "hardware": distinct(lines, "hardware"),
        "versions": distinct(lines, "versions"),
    }
    write_json(path, content)
    for pair in content["pairs"]:
        difference = format_estimate(pair["difference"], "+.4f")
        print(
            f"{pair['task']} {pair['task_options']}, {pair['budget']} gradients, seeds "
            f"{pair['seeds']}: {pair['loss']:.4f}, {pair['against']} {pair['loss_against']:.4f}, "
            f"difference {difference}"
        )
