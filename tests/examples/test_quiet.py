"""Training without noise: the problems, what is counted, and going on with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quiet
import quiet_tasks
import torch


def test_derivatives_are_those_of_autograd() -> None:
    model = quiet_tasks.network(0, 2, 6, 5, 1)
    x = torch.randn(7, 2, dtype=torch.float64).requires_grad_()
    value, first, second = quiet_tasks.derivatives(model, x)
    (expected,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.testing.assert_close(value, model(x).squeeze(1))
    torch.testing.assert_close(first, expected.T)
    for along in range(2):
        (twice,) = torch.autograd.grad(expected[:, along].sum(), x, retain_graph=True)
        torch.testing.assert_close(second[along], twice[:, along])


@pytest.mark.parametrize("name", quiet_tasks.TASKS)
def test_a_task_is_deterministic_and_learns(name: str) -> None:
    make = quiet_tasks.TASKS[name]
    assert make(1)[1]().item() == make(1)[1]().item() != make(2)[1]().item()
    losses = quiet.descend(make(1), quiet.adamw(1e-2), 40, decay=False)
    assert min(losses) < 0.99 * losses[0]


def test_every_evaluation_counts() -> None:
    make = quiet_tasks.TASKS["regression"]
    assert len(quiet.lbfgs(make(0), 30)) == 30
    mixed = quiet.adam_then_lbfgs(make(0), 1e-2, 0.2, 40)
    assert len(mixed) == 40
    assert mixed[:8] == quiet.descend(make(0), quiet.adamw(1e-2, weight_decay=0.0), 8, decay=False)
    assert mixed[8] < mixed[0], "L-BFGS begins where Adam ended"


def test_speed_ups_and_ratios() -> None:
    result = {
        "evaluations_to_adamw": {"AdamW": [100, 80], "auto": [20, None]},
        "lowest_loss": {"auto": [1e-4, 0.0], "L-BFGS": [1e-2, 1e-16]},
    }
    gains = quiet.speed_ups({"a": result, "b": result}, "auto", 100)
    assert gains["geometric mean"] == pytest.approx((5 * 0.8) ** 0.5)
    assert quiet.loss_ratios({"a": result}, "auto", "L-BFGS") == {"a": pytest.approx(0.1)}


def test_command_goes_on_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "quiet.json", []
    run_task = quiet.run_task

    def counted(name: str, *others: Any) -> dict[str, Any]:
        ran.append(name)
        return run_task(name, *others)

    monkeypatch.setattr(quiet, "run_task", counted)
    monkeypatch.setattr(quiet, "RATES", (1e-2,))
    given = ["--seeds", "0", "--evaluations", "40", "--output", str(path), "--tasks"]
    assert quiet.main([*given, "regression"]) == 0
    assert quiet.main([*given, "regression", "poisson"]) == 0
    assert ran == ["regression", "poisson"]
    content = json.loads(path.read_text())
    assert set(content["tasks"]) == {"regression", "poisson"}
    assert content["tasks"]["poisson"]["evaluations_to_adamw"]["AdamW"] == [40]
    assert content["speed_up_over_adamw"]["auto"]["geometric mean"] > 0
    assert quiet.main(["--seeds", "1", *given[2:], "regression"]) == 0
    assert set(json.loads(path.read_text())["tasks"]) == {"regression"}, "other seeds, other runs"


def test_times_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    flags = ["--times", "--evaluations", "40", "--tasks", "regression", "--output", str(path)]
    assert quiet.main(flags) == 0
    (times,) = json.loads(path.read_text())["milliseconds"].values()
    assert times.keys() == {"AdamW", "L-BFGS", "auto"}
    assert all(len(its) == 5 and its[0] > 0 for its in times.values())
