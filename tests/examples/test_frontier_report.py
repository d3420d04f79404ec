"""The judge of benchmark runs: it finds planted speed-ups, and none where there is none."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from frontier.judge import AT_LEAST, AT_MOST, Frontier, compare, tune, tune_budgets
from frontier.pairs import paired_losses, write_pairs
from frontier.report import load_lines, summarize, write_report
from lib.run_store import Line

BUDGETS = (250, 500, 1000, 2000, 4000)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
BEST_RATE = 4e-3
SEEDS = (0, 1, 2)
SEED_NOISE, RUN_NOISE = 0.02, 0.002
"""Of the loss: what paired runs have in common, and what they have not."""


def law(budget: float) -> float:
    """The loss of a well-tuned run, about that of a small language model."""
    return 1.2 + 20.0 / math.sqrt(budget)


class Runs:
    """Draws lines as runs would write them; the same arguments give the same lines."""

    def __init__(self, noise_seed: int = 0) -> None:
        self.generator = np.random.default_rng(noise_seed)

    def __call__(
        self,
        optimizer: str = "adamw",
        budgets: Sequence[int] = BUDGETS,
        rates: Sequence[float] = RATES,
        seeds: Sequence[int] = SEEDS,
        gain: float = 1.0,
        **fields: Any,
    ) -> list[Line]:
        """Every rate with the first seed, then the middle rate with the others."""
        lines = []
        for budget in budgets:
            for rate in rates:
                others = seeds if rate == rates[len(rates) // 2] else seeds[:1]
                lines += [self.line(optimizer, budget, rate, seed, gain, fields) for seed in others]
        return lines

    def line(
        self, optimizer: str, budget: int, rate: float, seed: int, gain: float, fields: Line
    ) -> Line:
        of_seed = float(np.random.default_rng(1000 + seed).normal()) * SEED_NOISE
        own = float(self.generator.normal()) * RUN_NOISE
        final = law(budget * gain) + 0.05 * math.log2(rate / BEST_RATE) ** 2 + of_seed + own
        marks = [max(1, budget * part // 8) for part in range(1, 9)]
        key = [optimizer, fields.get("optimizer_options"), fields.get("schedule"), budget, rate]
        return {
            "key": json.dumps([*key, seed]),
            "task": "lm", "task_options": {"width": 64}, "schedule": "linear",
            "optimizer": optimizer, "optimizer_options": {},
            "lr": rate, "budget": budget, "seed": seed, "gradient_evaluations": budget,
            "metric": "held_out", "final": final, "diverged": False, "stats": None,
            "curve": [[mark, 0.01 * mark, final * budget / mark] for mark in marks],
            "seconds": 0.01 * budget, "hardware": {"cpu": "one"}, "versions": {"torch": "2.13"},
            **fields,
        }  # fmt: skip


def only(lines: list[Line], budget: int = 1000) -> dict[str, Any]:
    """The one contender of a summary at a budget."""
    tasks = summarize(lines)["tasks"]
    rows = [row for task in tasks for row in task["contenders"] if row["budget"] == budget]
    assert len(rows) == 1
    return dict(rows[0])


def judged(budget: int = 1000, name: str = "contender", **changes: Any) -> dict[str, Any]:
    """A contender's row beside a well-tuned baseline."""
    runs = Runs()
    return only(runs() + runs(name, (budget,), **changes), budget)


# ------------------------------------------------------------------------------ true and false

OTHER_BETAS = {"optimizer_options": {"betas": [0.9, 0.95]}}
UNTUNED, WRONG_RATES = "contender not tuned", RATES[1:4]
VERDICTS: list[tuple[int, dict[str, Any], dict[str, Any], str]] = [
    (1000, {"gain": 1.5}, {"verdict": "faster", "control": "measured", "reasons": ()}, ""),
    (1000, {"gain": 1.5, "planted": "more"}, {"verdict": "planted"}, "planted: more"),
    (1000, {"gain": 0.7, "rates": WRONG_RATES}, {"verdict": "slower"}, UNTUNED),
    # An untuned contender is only undersold.
    (1000, {"gain": 1.5, "rates": WRONG_RATES}, {"verdict": "faster"}, UNTUNED),
    (1000, {"gain": 1.5, "gradient_evaluations": 1500}, {"verdict": "none"}, "more gradient eval"),
    # Beyond the frontier there are bounds.
    (2000, {"gain": 3.0}, {"verdict": "faster", "bound": AT_LEAST, "mean": 2.0}, ""),
    (500, {"gain": 0.1}, {"verdict": "slower", "bound": AT_MOST, "mean": 0.5}, ""),
    (125, {}, {"verdict": "none", "bound": AT_MOST, "control": None}, ""),
    (1000, {"diverged": True, "final": None},
     {"verdict": "slower", "bound": AT_MOST, "problem": "every learning rate diverged"}, ""),
    # A budget that the baseline lacks is interpolated, and an advantage must exceed its error.
    (1400, {"gain": 1.5}, {"verdict": "faster", "control": "interpolated"}, ""),
    (1400, {"gain": 1.02}, {"verdict": "none", "seconds_ratio": None}, ""),
    (1000, {"gain": 1.5, "schedule": "constant"}, {"verdict": "faster"}, "its linear schedule"),
    (1000, {"name": "adamw", **OTHER_BETAS},
     {"verdict": "none", "label": "adamw, betas=[0.9, 0.95]"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("budget", "changes", "expected", "reason"), VERDICTS)
def test_verdicts(
    budget: int, changes: dict[str, Any], expected: dict[str, Any], reason: str
) -> None:
    row = judged(budget, **changes)
    row["mean"] = row["speedup"]["mean"]
    assert {name: row[name] for name in expected} == expected
    assert any(reason in note for note in row["reasons"]) or not reason


def test_a_speedup_is_measured() -> None:
    row = judged(gain=1.5)
    speedup = row["speedup"]
    assert speedup["low"] <= 1.5 <= speedup["high"]
    assert 1.01 < speedup["high"] / speedup["low"] < 1.15
    assert row["loss_difference"]["high"] < 0
    assert judged(gain=0.7, rates=RATES[1:4])["speedup"]["mean"] == pytest.approx(0.7, abs=0.02)
    planted = judged(gain=1.5, planted="1.5 times the gradients")["speedup"]
    assert planted["low"] <= 1.5 <= planted["high"]


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ((2.5e-4, 5e-4, 1e-3, 2e-3), "edge of the grid"),
        ((2.5e-4, 1e-3, 2.5e-3), "fewer than 4"),
    ],
)
def test_a_gain_over_a_badly_tuned_baseline_is_none(rates: tuple[float, ...], reason: str) -> None:
    baseline = [line for seed in SEEDS for line in Runs(seed)(rates=rates, seeds=(seed,))]
    contender = Runs(9)("contender", (1000,))
    row = only(baseline + contender)
    assert row["speedup"]["low"] > 1.0, "the trap is set"
    assert row["verdict"] == "none"
    assert any("baseline not tuned" in note and reason in note for note in row["reasons"])

    row = only(Runs(1)() + contender)
    assert row["speedup"]["low"] <= 1.0 <= row["speedup"]["high"]
    assert row["speedup"]["mean"] == pytest.approx(1.0, abs=0.02)
    assert row["verdict"] == "none"


def test_a_rate_that_won_by_luck_on_one_seed_does_not_stay_the_best() -> None:
    """AdamW at 9e-3 once had the lowest loss with seed 0, and by far the highest with seed 2."""
    lines = [line for rate in RATES for line in Runs()("adamw", (1000,), rates=(rate,))]
    for line in lines:
        if line["lr"] == RATES[3]:
            line["final"] += {0: -0.5, 1: 0.4, 2: 0.8}[line["seed"]]
    chosen = tune(lines)
    assert (chosen.lr, chosen.problem) == (BEST_RATE, None)


def test_a_rate_given_up_while_it_was_ahead_leaves_the_baseline_untuned() -> None:
    lines = Runs()("adamw", (1000,))
    lines[1]["final"] -= 1.0
    assert lines[1]["lr"] == RATES[1]
    chosen = tune(lines)
    assert chosen.lr == BEST_RATE
    assert chosen.problem == "learning rate 0.002 is better on the seeds it was run with"


def test_one_badly_tuned_budget_matters_only_where_the_answer_is_read() -> None:
    runs = Runs()
    tuned = [line for line in runs() if line["budget"] != 4000]
    lines = tuned + runs(budgets=(4000,), rates=RATES[:3])
    assert only(lines + runs("near", (500,), gain=1.5), 500)["verdict"] == "faster"
    row = only(lines + runs("far", (2000,), gain=1.5), 2000)
    assert row["verdict"] == "none"
    assert any("4,000" in note for note in row["reasons"])


def test_equal_optimizers_come_out_at_one() -> None:
    ratios, false, false_on_flat = [], 0, 0
    for repetition in range(30):
        runs = Runs(repetition)
        result = compare(tune(runs("same", (1000,))), tune_budgets(runs()))
        assert result.speedup is not None
        ratios.append(math.log(result.speedup.mean))
        false += result.verdict != "none"
        # On a flat frontier a tiny difference in loss is a large one in budget.
        lines = runs() + runs("same", (2000,))
        for line in lines:
            line["final"] -= law(line["budget"]) - law(max(500, line["budget"] // 100))
        false_on_flat += only(lines, 2000)["verdict"] != "none"
    assert math.exp(np.mean(ratios)) == pytest.approx(1.0, abs=0.005)
    assert false <= 4, "1 in 20 is what an interval of 95% allows"
    assert false_on_flat <= 3


def test_losses_over_orders_of_magnitude_are_compared_by_their_logarithms() -> None:
    runs = Runs()
    lines = runs() + runs("fast", (1000,), gain=1.5)
    for line in lines:
        gain = 1.5 if line["optimizer"] == "fast" else 1.0
        noise = 1.0 + line["final"] - law(line["budget"] * gain)
        # A training loss over eight orders of magnitude.
        line.update(final=10.0 ** (-line["budget"] * gain / 500.0) * noise, metric="train")
    row = only(lines)
    assert row["speedup"]["mean"] == pytest.approx(1.5, abs=0.02)
    assert row["speedup"]["high"] / row["speedup"]["low"] < 1.05
    assert row["loss_ratio"]["mean"] == pytest.approx(0.1, rel=0.1)


# -------------------------------------------------------------------------------- what is amiss


def test_diverged_runs() -> None:
    runs = Runs()
    lines, some = runs(), runs("some", (1000,), gain=1.5)
    next(x for x in some if x["seed"] == 1).update(diverged=True, final=None)
    row = only(lines + some)
    assert (row["diverged"], row["verdict"]) == (1, "none")
    assert row["loss_difference"] is None
    for line in lines:  # a diverging rate is the end of what can be tried, and not an edge
        if line["lr"] == RATES[-1]:
            line.update(diverged=True, final=None)
    assert all(row["tuned"] for row in summarize(lines)["tasks"][0]["frontier"])
    row = only(runs(diverged=True, final=None) + runs("contender", (1000,)))
    assert (row["verdict"], row["speedup"], row["seeds"]) == ("undecided", None, ())


def test_missing_seeds_are_left_out_and_said() -> None:
    runs = Runs()
    row = only(runs(seeds=(0, 1)) + runs("fast", (1000,), seeds=(0, 1, 7), gain=1.5))
    assert (row["seeds"], row["unpaired_seeds"]) == ((0, 1), (7,))
    row = only(runs(seeds=(0,)) + runs("fast", (1000,), gain=1.5))
    assert (row["verdict"], row["speedup"]["low"]) == ("undecided", None)
    assert row["reasons"][0].startswith("one seed")
    row = only(runs("without a baseline", (1000,)))
    assert (row["verdict"], row["speedup"], row["control"]) == ("undecided", None, None)


def test_the_order_of_lines_makes_no_difference() -> None:
    runs = Runs()
    lines = runs() + runs("fast", gain=1.5) + runs("slow", (500, 1000), gain=0.8)
    shuffled = list(lines)
    random.Random(0).shuffle(shuffled)
    assert summarize(shuffled) == summarize(lines)


# ------------------------------------------------------------------------------------ the parts

losses = st.lists(st.floats(0.1, 10.0), min_size=5, max_size=5)


@given(losses, st.floats(0.05, 20.0), st.floats(0.05, 20.0))
def test_a_lower_loss_never_needs_less(points: list[float], first: float, second: float) -> None:
    frontier = Frontier(dict(zip(BUDGETS, points)))
    low, high = sorted((first, second))
    assert frontier.needed(low).budget >= frontier.needed(high).budget * (1 - 1e-9)


@given(losses, st.floats(0.05, 20.0), st.sampled_from([0.01, 0.5, 3.0]), st.booleans())
def test_the_unit_of_the_loss_makes_no_difference(
    points: list[float], loss: float, factor: float, logarithmic: bool
) -> None:
    distinct = {budget: round(point, 3) for budget, point in zip(BUDGETS, points)}
    scaled = {budget: point * factor for budget, point in distinct.items()}
    loss = round(loss, 3) + 0.0005  # never a point itself, where rounding decides the side
    one = Frontier(distinct, logarithmic).needed(loss)
    other = Frontier(scaled, logarithmic).needed(loss * factor)
    assert other.budget == pytest.approx(one.budget, rel=1e-6)
    assert other.bound == one.bound


@given(losses)
def test_a_frontier_meets_its_own_points(points: list[float]) -> None:
    frontier = Frontier(dict(zip(BUDGETS, points)))
    for budget, loss in zip(frontier.budgets, frontier.losses):
        assert frontier.needed(loss).budget == budget


# ------------------------------------------------------------------------------------ the files


def test_lines_are_read_once_and_a_torn_one_is_skipped(tmp_path: Path) -> None:
    lines = Runs()(budgets=(250,))
    text = "".join(json.dumps(line) + "\n" for line in [*lines, lines[0]])
    path = tmp_path / "runs.jsonl"
    for content in (text + '{"key": "torn", "fin', '{"key": "torn", "fin\n' + text):
        path.write_text(content)
        with pytest.warns(UserWarning, match="is not JSON"):
            assert load_lines([path, path]) == lines
    path.write_text("3\n")
    with pytest.raises(ValueError, match="not a JSON object with a key"):
        load_lines([path])


def test_the_report_is_written(tmp_path: Path) -> None:
    runs = Runs()
    lines = runs() + runs("fast", (500, 1000), gain=1.5, stats={"predicted_steps": 40})
    lines += runs("lost|found", (1000,), diverged=True, final=None, curve=[[1, 0.1, None]])
    console = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w"))
    summary = write_report(lines, tmp_path / "report", console)
    written = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert (written["runs"], written["seeds"]) == (len(lines), [0, 1, 2])
    assert written["hardware"] == [{"cpu": "one"}]
    task = written["tasks"][0]
    assert [row["budget"] for row in task["frontier"]] == list(BUDGETS)
    speedups = [row["speedup"]["mean"] for row in task["contenders"]]
    assert speedups == sorted(speedups, reverse=True)
    assert task["contenders"][0]["stats"] == {"predicted_steps": 40.0}
    assert task["contenders"][0]["seconds_ratio"] == pytest.approx(1.0)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "lost\\|found" in report
    assert len(task["plots"]) == 3
    for name in task["plots"]:
        assert f"({name})" in report
        assert (tmp_path / "report" / name).stat().st_size > 5000
    assert "faster" in console.export_text()


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 runs"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match=r"\[250, 500\]"):
        tune(Runs()(budgets=(250, 500)))


def test_pairs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """The difference is that of seeds both have; a setting each has its row."""
    lines = []
    for seed, (ours, theirs) in enumerate([(1.0, 1.5), (2.0, 2.3), (9.0, None)]):
        for optimizer, loss, more in (
            ("hybrid-muon", ours, {}),
            ("hybrid-muon-none", theirs, {"optimizer_options": {"momentum": 0.9}}),
            ("hybrid-muon-none", theirs, {"lr": 2.0}),
        ):
            if loss is not None:
                line = {"task": "lm", "task_options": {}, "budget": 4, "lr": 1.0, "seed": seed}
                line |= {"optimizer_options": {}, "final": loss, "diverged": False}
                lines.append({**line, "optimizer": optimizer, **more})
    for line in lines:
        line |= {"hardware": {"threads": 1}, "versions": {}}
    pairs = paired_losses(lines, "hybrid-muon")
    assert [pair["against"]["lr"] for pair in pairs] == [1.0, 2.0]
    for pair in pairs:
        assert pair["seeds"] == [0, 1]
        assert pair["difference"]["mean"] == pytest.approx(-0.4)
        assert pair["difference"]["low"] < -0.4 < pair["difference"]["high"]
        assert (pair["loss"], pair["loss_against"]) == (1.5, 1.9)
    write_pairs(lines, "hybrid-muon", tmp_path / "pairs.json")
    assert len(json.loads((tmp_path / "pairs.json").read_text())["pairs"]) == 2
    with pytest.raises(ValueError, match="2 settings"):
        paired_losses(lines, "hybrid-muon-none")
