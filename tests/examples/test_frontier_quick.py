"""The quick frontier from end to end: what was planted must be found, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frontier import command
from frontier.report import load_lines, summarize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the optimizer that no test here asks for."""
    target = tmp_path_factory.mktemp("quick")
    adamw, others = command.QUICK_GRIDS
    planted = replace(others, optimizers={"adamw-x1.5": {}, "adamw-again": {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "QUICK_GRIDS", (adamw, planted))
        assert command.main(["--quick", "--output", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, Any]]:
    return load_lines([folder / "quick.jsonl"])


def contender(summary: dict[str, Any], name: str) -> dict[str, Any]:
    (task,) = summary["tasks"]
    (found,) = [entry for entry in task["contenders"] if entry["optimizer"] == name]
    return dict(found)


def test_it_leaves_a_summary_a_table_and_plots(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["diverged_runs"] == 0
    assert all(row["tuned"] for row in summary["tasks"][0]["frontier"])
    assert "speed-up" in (folder / "report.md").read_text().lower()
    assert len(list(folder.glob("*.png"))) == 3


def test_a_planted_speed_up_is_found_within_its_interval(lines: list[dict[str, Any]]) -> None:
    found = contender(summarize(lines), "adamw-x1.5")["speedup"]
    assert found["low"] <= 1.5 <= found["high"]
    assert found["low"] > 1.0


def test_an_equal_optimizer_comes_out_at_one(lines: list[dict[str, Any]]) -> None:
    found = contender(summarize(lines), "adamw-again")["speedup"]
    assert found["low"] <= 1.0 <= found["high"]


def test_a_gain_over_a_badly_tuned_baseline_is_none(lines: list[dict[str, Any]]) -> None:
    """AdamW under another name, tuned, against AdamW at the lowest rates alone."""
    lowest = min(command.QUICK_RATES)
    kept = []
    for line in lines:
        if line["optimizer"] == "adamw-again":
            kept.append(line | {"optimizer": "lion", "planted": None})
        elif line["optimizer"] == "adamw" and line["lr"] == lowest:
            kept.append(line)
    found = contender(summarize(kept), "lion")
    assert found["speedup"]["low"] > 1.0, "it looks like a gain"
    assert found["verdict"] == "none"
    assert any("baseline not tuned" in reason for reason in found["reasons"]), found["reasons"]
