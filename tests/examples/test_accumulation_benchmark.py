"""The comparison of adaptive windows with fixed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accumulation
import pytest


def record(least: int, budget: int, loss: float, seed: int = 1, **others: Any) -> dict[str, Any]:
    """What a run leaves."""
    known = {"maximum": 4, "minimum": least, "budget": budget, "micro_batch": 16, "lr": 1e-3}
    known |= {"base": "adamw", "predictor": "none", "seed": seed}
    return {**known, "held_out": loss, "processor_seconds": 1.0, **others}


def test_the_speed_up_is_the_budget_of_fixed_windows_over_that_to_their_loss() -> None:
    fixed = [record(4, 2000, 2.0, seed) for seed in (1, 2)]
    # A smaller budget of fixed windows is no goal: they are compared with their longest run.
    fixed += [record(4, 1600, 2.4, seed) for seed in (1, 2)]
    between = [record(1, 500, 2.1, 1), record(1, 2000, 1.9, 1)]
    reached = [record(1, 500, 1.9, 2)]
    (line,) = accumulation.speed_ups([*fixed, *between, *reached])
    assert line["seeds"][1]["speed_up"] == pytest.approx(2.0)  # halfway in the logarithm: 1,000
    assert line["seeds"][2] | {"runs": None} == {
        "fixed": [2000, 2.0], "runs": None, "speed_up": None, "at_least": 4.0,
    }  # fmt: skip
    assert line["speed_up"] is None  # no interval where one seed has a bound alone
    never = accumulation.speed_ups([*fixed, record(1, 500, 2.1, 1)])[0]["seeds"][1]
    assert never["speed_up"] is None
    assert never["at_least"] is None


def test_other_bases_have_the_same_goal() -> None:
    fixed = [record(4, 2000, 2.0, seed) for seed in (1, 2)]
    muon = [record(4, 500, 1.9, seed, base="muon", lr=2e-2) for seed in (1, 2)]
    muon += [record(4, 125, 2.1, seed, base="muon", lr=2e-2) for seed in (1, 2)]
    (line,) = accumulation.speed_ups([*fixed, *muon])
    assert line["speed_up"]["mean"] == pytest.approx(8.0)


def test_adaptive_windows_are_paired_with_fixed_ones_of_as_many_micro_batches() -> None:
    adaptive = [record(1, 100, 2.0 + seed, seed, processor_seconds=1.5) for seed in (1, 2, 3)]
    ones = [record(1, 100, 1.9 + seed, seed, maximum=1) for seed in (1, 2)]
    other = [record(1, 90, 1.0, seed, maximum=1) for seed in (1, 2)]
    (line,) = accumulation.differences([*adaptive, *ones, *other])
    assert line["window"] == 1
    assert line["difference"]["n"] == 2
    assert line["difference"]["mean"] == pytest.approx(0.1)
    assert line["processor_time"]["mean"] == pytest.approx(1.5)


def test_it_runs_what_its_file_does_not_hold(tmp_path: Path) -> None:
    output = tmp_path / "accumulation.json"
    flags = ["--output", str(output), "--maximum", "2", "--micro-batch", "1", "--seeds", "0"]
    assert accumulation.main([*flags, "--fixed", "4"]) == 0
    first = json.loads(output.read_text("utf-8"))["runs"]
    assert accumulation.main([*flags, "--fixed", "4", "--adaptive", "6"]) == 0
    content = json.loads(output.read_text("utf-8"))
    assert content["runs"][0] == first[0]
    assert len(content["runs"]) == 2
    assert [run["steps"] for run in first] == [2]
    assert first[0]["noise_scale"][-1] is None
    assert content["runs"][1]["noise_scale"][-1] is not None
    assert content["speed_ups"][0]["minimum"] == 1
    assert output.with_suffix(".png").stat().st_size > 10_000
