"""HybridOptimizer in AdamW's place: the tasks, the judge, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from frontier import command
from frontier.never_worse import MARGIN, OPTIMIZERS, REFERENCE, judge, train_once
from frontier.swap_tasks import SWAP_TASKS

RESULTS = Path(command.__file__).parents[1] / "results" / "frontier"
STEPS = 30  # more than the warm-up: the hybrid predicts


@pytest.mark.parametrize("task", SWAP_TASKS)
def test_a_run_is_decided_by_its_seed_and_paired_with_that_of_adamw(task: str) -> None:
    state = torch.get_rng_state()
    one = {name: train_once(task, name, 3, STEPS) for name in OPTIMIZERS}
    assert train_once(task, "hybrid", 3, STEPS)["measures"] == one["hybrid"]["measures"]
    assert torch.equal(torch.get_rng_state(), state)
    theirs = one[REFERENCE]["measures"]
    assert all(value > 0 and math.isfinite(value) for value in theirs.values())
    # Same weights, data and number of steps: without predictions there is rounding alone.
    assert one["hybrid-none"]["measures"] == pytest.approx(theirs, rel=1e-3)
    assert one["adamw-gain"]["measures"] != pytest.approx(theirs, rel=1e-3)
    assert train_once(task, REFERENCE, 4, STEPS)["measures"] != theirs
    predicted = sum(stats["predicted_steps"] for stats in one["hybrid"]["stats"])
    assert (predicted > 0) == (task != "gan"), "auto leaves groups with so low a beta1 alone"


@pytest.mark.parametrize("task", ["small-batch", "td", "shift"])
def test_training_helps(task: str) -> None:
    begun, done = (train_once(task, REFERENCE, 0, n)["measures"] for n in (2, None))
    assert all(done[name] < 0.8 * begun[name] for name in done)


def measures(ratio: float, spread: float) -> tuple[list[float], list[float]]:
    """Four seeds of very different size, at a ratio."""
    theirs = [0.1, 1.0, 5.0, 20.0]
    factors = (ratio * math.exp(sign * spread) for sign in (1, -1, 1, -1))
    return [x * factor for x, factor in zip(theirs, factors)], theirs


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict", "worse"),
    [
        (0.8, 0.05, "not worse", 0),
        (1.0, 0.0, "not worse", 0),
        (1.02, 0.001, "not worse", 4),  # worse, by less than the margin
        (0.9, 0.2, "undecided", 2),
        (1.2, 0.02, "worse", 4),
    ],
)
def test_verdicts(ratio: float, spread: float, verdict: str, worse: int) -> None:
    row = judge(*measures(ratio, spread))
    assert (row["verdict"], row["worse"], row["seeds"]) == (verdict, worse, 4)
    assert row["ratio"]["low"] <= row["ratio"]["mean"] <= row["ratio"]["high"]
    assert row["ratio"]["mean"] == pytest.approx(ratio)


def test_what_diverged_is_worse_unless_adamw_did() -> None:
    ours, theirs = measures(0.8, 0.01)
    row = judge([math.nan, *ours[1:]], theirs)
    assert (row["verdict"], row["worse"], row["diverged"]) == ("worse", 1, 1)
    assert judge(ours, [math.nan, *theirs[1:]])["verdict"] == "not worse"
    assert judge([math.inf], [math.inf])["ratio"] is None
    assert judge([1.0], [2.0])["verdict"] == "undecided", "one seed has no interval"


def test_the_command_leaves_a_summary_and_a_table(tmp_path: Path, capsys: Any) -> None:
    given = ["never-worse", "--tasks", "shift", "--seeds", "0", "1", "--steps", "8"]
    assert command.main([*given, "--output", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"hardware", "versions", "hybrid", "seeds", "tasks", "runs"} <= set(summary)
    assert (summary["tasks"]["shift"]["steps"], len(summary["runs"])) == (8, 2 * len(OPTIMIZERS))
    report = (tmp_path / "report.md").read_text()
    assert "| shift | held-out error, last 50% | hybrid |" in report
    assert report in capsys.readouterr().out


def test_the_committed_results_are_of_the_tasks_as_they_are() -> None:
    tasks, optimizers = set[str](), set[str]()
    for name in ("never_worse", "losses_told"):
        summary = json.loads((RESULTS / name / "summary.json").read_text())
        assert summary["margin"] == MARGIN
        for key, its in summary["tasks"].items():
            task = SWAP_TASKS[key]
            assert (its["steps"], its["lr"]) == (task.steps, task.lr)
        found = {run["optimizer"] for run in summary["runs"]}
        pairs = len(summary["tasks"]) * len(found)
        assert len(summary["runs"]) == pairs * len(summary["seeds"])
        tasks, optimizers = tasks | {*summary["tasks"]}, optimizers | found
    assert (tasks, optimizers) == ({*SWAP_TASKS}, {*OPTIMIZERS})
