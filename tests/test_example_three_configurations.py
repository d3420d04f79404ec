from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("scipy")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import configurations_runs
import three_configurations
import training_run
from configurations_options import (
    CONFIGURATIONS,
    MEMORY_OPTIMISED,
    SIXTEEN_BIT,
    Plan,
    parse_options,
)
from configurations_report import SOURCE, WIDTH, comparison_table, comparisons, result_table
from configurations_runs import ConfigurationRun, DivergedError, RunStore, order, run_configuration
from configurations_statistics import compare_percent, compare_ratios
from rich.console import Console
from run_records import BASELINE, CONTROL, HYBRID
from scipy import stats
from text_data import TokenizedText, load_corpus, tokenize
from transformers import GPT2LMHeadModel

from triton_hybrid import HybridConfig, HybridOptimizer

STEPS = 24
MADE_UP_BYTES = {"parameter_bytes": 10, "state_bytes_device": 20, "state_bytes_host": 4,
                 "memory_before": 50, "memory_peak": 300}  # fmt: skip


@pytest.fixture(autouse=True)
def surroundings(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(text_folder.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are much slower beside other work
    yield
    torch.set_num_threads(threads)


def flags(text_folder: Path, output: Path, *more: str) -> list[str]:
    tiny = "--device cpu --batch 4 --length 16 --held-out-windows 4 --vocabulary 300"
    steps = () if "--steps" in more else ("--steps", str(STEPS))
    return [*tiny.split(), *steps, "--data", str(text_folder), "--output", str(output), *more]


def plan_and_text(text_folder: Path, output: Path, *more: str) -> tuple[Plan, TokenizedText]:
    plan = parse_options(flags(text_folder, output, *more))
    return plan, tokenize(load_corpus([text_folder]), 300)


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return content


def made_up(configuration: str, seed: int, seconds: float, held_out: float) -> ConfigurationRun:
    return ConfigurationRun(
        configuration=configuration,
        seed=seed,
        optimizer="made up",
        device="cpu",
        tokens_per_batch=64,
        steps={
            "phase": ["full", "predict"],
            "seconds": [seconds, 0.0],
            "processor_seconds": [seconds, 0.0],
            "memory_bytes": [100, 200],
            "gradients": [1, 1],
            "loss": [5.0, None],
        },
        held_out_start=6.0,
        held_out_end=held_out,
        stats=None,
        **MADE_UP_BYTES,
    )


# ---------------------------------------------------------------- the whole


def test_end_to_end_and_resume(
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[tuple[str, int]] = []
    batches: dict[tuple[str, int], list[torch.Tensor]] = {}

    def recorded(configuration: str, seed: int, *rest: Any) -> ConfigurationRun:
        if interrupt_at == len(trained):
            raise KeyboardInterrupt
        trained.append((configuration, seed))
        return run_configuration(configuration, seed, *rest)

    draw = training_run.WindowSampler.draw

    def recorded_draw(sampler: training_run.WindowSampler) -> torch.Tensor:
        batch = draw(sampler)
        batches.setdefault(trained[-1], []).append(batch)
        return batch

    monkeypatch.setattr(three_configurations, "run_configuration", recorded)
    monkeypatch.setattr(training_run.WindowSampler, "draw", recorded_draw)
    arguments = flags(text_folder, tmp_path, "--seeds", "3", "7")

    interrupt_at = 7
    assert three_configurations.main(arguments) == three_configurations.INTERRUPTED
    assert "goes on from here" in capsys.readouterr().out
    assert not results(tmp_path)["complete"]

    # A line cut short is done again, and swallows nothing.
    with (tmp_path / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": {"confi')
    interrupt_at = -1
    assert three_configurations.main(arguments) == 0
    assert trained == [(name, 3) for name in order(0)] + [(name, 7) for name in order(1)]

    assert three_configurations.main(arguments) == 0
    assert len(trained) == 10
    assert "kept from before" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    content = results(tmp_path)
    assert content["complete"]
    assert content["seeds"] == [3, 7]
    assert {"hardware", "versions", "options", "configurations", "data"} <= content.keys()
    assert len(content["runs"]) == 10
    assert str(tmp_path) not in json.dumps(content["hardware"])
    found = {(run["configuration"], run["seed"]): run for run in content["runs"]}
    for seed in (3, 7):
        hybrid, control = found[HYBRID, seed], found[CONTROL, seed]
        memory = found[MEMORY_OPTIMISED, seed]
        assert set(hybrid["steps"]) == set(configurations_runs.STEP_FIELDS)
        assert {len(column) for column in hybrid["steps"].values()} == {STEPS}
        assert hybrid["gradient_evaluations"] < STEPS
        # As many gradients as HybridOptimizer, and no step without one.
        assert control["gradient_evaluations"] == hybrid["gradient_evaluations"]
        assert len(control["steps"]["seconds"]) == hybrid["gradient_evaluations"]
        assert 2 * memory["parameter_bytes"] == hybrid["parameter_bytes"]
        assert memory["state_bytes_host"] > 0
        # The same masters and windows, without predictions and what they keep.
        sixteen = found[SIXTEEN_BIT, seed]
        assert sixteen["parameter_bytes"] == memory["parameter_bytes"]
        assert sixteen["gradient_evaluations"] == STEPS
        assert sixteen["stats"]["predicted_steps"] == 0
        assert sixteen["state_bytes_host"] == 0
        # Eight bytes a parameter, and the counters.
        assert found[BASELINE, seed]["state_bytes_device"] == pytest.approx(
            2 * hybrid["parameter_bytes"], rel=1e-3
        )
        assert found[BASELINE, seed]["held_out_start"] == hybrid["held_out_start"]
        # The k-th gradient sees the same batch in every configuration.
        for name in (HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT, CONTROL):
            others = batches[name, seed]
            assert all(
                torch.equal(a, b) for a, b in zip(batches[BASELINE, seed], others, strict=False)
            )
    assert not torch.equal(batches[BASELINE, 3][0], batches[BASELINE, 7][0])


def test_other_settings_are_other_runs(text_folder: Path, tmp_path: Path) -> None:
    run = made_up(BASELINE, 0, 1.0, 5.0)
    path = tmp_path / "runs.jsonl"
    store = RunStore(path, {"versions": {"torch": "1"}})
    plan = parse_options(flags(text_folder, tmp_path))
    store.add(store.key(plan, BASELINE, 0, 10), run)

    again = RunStore(path, {"versions": {"torch": "1"}})
    assert again.get(again.key(plan, BASELINE, 0, 10)) == run
    other_plan = parse_options(flags(text_folder, tmp_path, "--lr", "0.5"))
    for other in (
        again.key(other_plan, BASELINE, 0, 10),
        again.key(plan, BASELINE, 1, 10),
        again.key(plan, BASELINE, 0, 11),
        again.key(plan, HYBRID, 0, 10),
        RunStore(path, {"versions": {"torch": "2"}}).key(plan, BASELINE, 0, 10),
    ):
        assert again.get(other) is None
    fine = parse_options(flags(text_folder, tmp_path, "--precision", "fp16", "--seeds", "0", "9"))
    assert again.get(again.key(fine, BASELINE, 0, 10)) == run


def test_every_configuration_goes_first_once() -> None:
    orders = [order(index) for index in range(4)]
    assert {found[0] for found in orders} == {BASELINE, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT}
    for found in orders:
        assert sorted(found) == sorted(CONFIGURATIONS)
        assert found[-1] == CONTROL


# ---------------------------------------------------------------- windows


def test_needs_backward_holds_for_a_whole_window(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, text = plan_and_text(text_folder, tmp_path, "--steps", "30")
    events: list[str] = []
    forward, step = GPT2LMHeadModel.forward, HybridOptimizer.step
    needs = HybridOptimizer.needs_backward

    def recorded_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            events.append(f"forward {kwargs['input_ids'].shape[0]}")
        return forward(model, *args, **kwargs)

    def recorded_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        events.append(f"step {optimizer.phase.name.lower()}")
        return step(optimizer, *args, **kwargs)

    def recorded_needs(optimizer: Any) -> bool:
        events.append("needs_backward")
        return bool(needs.fget(optimizer))  # type: ignore[attr-defined]

    monkeypatch.setattr(GPT2LMHeadModel, "forward", recorded_forward)
    monkeypatch.setattr(HybridOptimizer, "step", recorded_step)
    monkeypatch.setattr(HybridOptimizer, "needs_backward", property(recorded_needs))
    run = run_configuration(MEMORY_OPTIMISED, 0, 30, plan, text)

    # The warm-up's gradient is thrown away before the first step.
    windows = "|".join(events[events.index("needs_backward") :]).split("needs_backward|")[1:]
    assert len(windows) == 30
    phases = run.steps["phase"]
    assert "predict" in phases
    for window, phase in zip(windows, phases, strict=True):
        passes = 0 if phase == "predict" else 4
        expected = ["forward 1"] * passes + [f"step {phase}"]
        assert window.strip("|").split("|") == expected


def test_accumulated_gradient_is_that_of_the_whole_batch(text_folder: Path, tmp_path: Path) -> None:
    plan, text = plan_and_text(text_folder, tmp_path, "--steps", "3")
    losses = []
    for micro_batches in (1, 4):
        record = training_run.RunRecord(HYBRID, 0, 3, 64)
        training_run.train(record, plan.base, text, micro_batches=micro_batches)
        losses.append([*record.losses, record.held_out_end])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fp16_is_scaled(text_folder: Path, tmp_path: Path) -> None:
    plan, text = plan_and_text(
        text_folder, tmp_path, "--steps", "3", "--precision", "fp16", "--offload", "none"
    )
    run = run_configuration(MEMORY_OPTIMISED, 0, 3, plan, text)
    assert run.stats is not None
    assert run.stats["loss_scale"] > 1
    assert run.state_bytes_host == 0
    assert run.losses == pytest.approx(run_configuration(HYBRID, 0, 3, plan, text).losses, rel=1e-2)


def test_a_diverged_run_is_an_error_and_not_kept(
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_run, "evaluate", lambda model, windows: math.nan)
    plan, text = plan_and_text(text_folder, tmp_path, "--steps", "1")
    with pytest.raises(DivergedError, match=r"hybrid, seed 5: .* nan, .*--lr"):
        run_configuration(HYBRID, 5, 1, plan, text)
    assert three_configurations.main(flags(text_folder, tmp_path, "--steps", "1")) == 2
    assert "baseline, seed 0" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


# ---------------------------------------------------------------- the numbers


def test_t_tests_agree_with_scipy() -> None:
    ours, theirs = [5.1, 5.3, 5.0, 5.6], [5.0, 5.25, 5.1, 5.2]
    found = compare_ratios(ours, theirs)
    logarithms = ([math.log(x) for x in ours], [math.log(x) for x in theirs])
    expected = stats.ttest_rel(*logarithms)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert math.log(found.low or 0) == pytest.approx(interval.low, rel=1e-9)
    assert math.log(found.high or 0) == pytest.approx(interval.high, rel=1e-9)
    inverse = compare_ratios(theirs, ours)
    assert inverse.p_value == pytest.approx(found.p_value)
    assert inverse.mean == pytest.approx(1 / found.mean)

    percent = compare_percent(ours, theirs)
    differences = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    assert percent.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)


def test_interval_by_hand() -> None:
    # Differences 1, 2 and 3 percent: mean 2, standard error 1/sqrt(3), t(2, 97.5%) = 4.3027.
    found = compare_percent([101.0, 102.0, 103.0], [100.0] * 3)
    assert found.mean == pytest.approx(2)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), rel=1e-5)
    assert found.p_value == pytest.approx(0.0741799, rel=1e-5)


def test_no_test_without_spread() -> None:
    single = compare_ratios([2.0], [1.0])
    assert (single.mean, single.low, single.high, single.p_value) == (2, None, None, None)
    same = compare_ratios([2.0, 4.0], [1.0, 2.0])
    assert (same.mean, same.p_value) == (pytest.approx(2), None)
    assert same.low == same.high == pytest.approx(2)


@pytest.mark.parametrize(
    "bad", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([math.nan], [1.0])]
)
def test_what_cannot_be_compared_is_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        compare_ratios(*bad)


def test_tables_show_the_source_beside_ours(text_folder: Path, tmp_path: Path) -> None:
    plan = parse_options(flags(text_folder, tmp_path))
    runs = {
        name: [made_up(name, seed, 2.0 + seed + index, 5.0 + index / 10) for seed in (0, 1)]
        for index, name in enumerate(CONFIGURATIONS)
    }
    console = Console(width=WIDTH, record=True)
    console.print(result_table(runs, plan))
    found = comparisons(runs)
    console.print(comparison_table(found))
    text = console.export_text()
    for label, cells in SOURCE.items():
        line = next(line for line in text.splitlines() if line.startswith(f" {label} "))
        assert all(cell in line for cell in cells), line
    assert "…" not in text
    entry = next(e for e in found if (e["configuration"], e["reference"]) == (HYBRID, BASELINE))
    assert entry["speed_up_wall_clock"].values == pytest.approx((2 / 3, 3 / 4))
    assert entry["held_out_percent_above"].mean == pytest.approx(2)
    # On a CPU what is offloaded counts: it lies in the same memory.
    assert runs[HYBRID][0].kept_bytes == 44


# ---------------------------------------------------------------- the flags


def test_defaults() -> None:
    plan = parse_options([])
    source = HybridConfig.quick_validation().to_dict()
    assert {**plan.base.hybrid.to_dict(), "inline": True} == source
    assert plan.base.drive == "stepped"
    assert (plan.base.model, plan.base.seeds, plan.base.threads) == ("tiny", (0, 1, 2), 1)
    memory = plan.options(MEMORY_OPTIMISED)
    assert (memory.precision, memory.hybrid.offload) == ("bf16", "cpu")
    assert plan.micro_batches(MEMORY_OPTIMISED) == 4
    for name in (BASELINE, HYBRID, CONTROL):
        assert plan.options(name) is plan.base
        assert plan.micro_batches(name) == 1
    assert plan.base.precision == "fp32"
    assert plan.base.hybrid.offload == "none"
    small = parse_options(["--model", "small"]).base
    assert (small.steps, small.learning_rate, small.schedule) == (50, 6e-4, "constant")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model giant", "--model: invalid choice: 'giant'"),
        ("--precision fp32", "--precision: invalid choice: 'fp32'"),
        ("--offload disk", "--offload: invalid choice: 'disk'"),
        ("--accumulation 0", "--accumulation: '0' is not possible; allowed: whole numbers from 1"),
        ("--accumulation 3", "--accumulation: 3 does not divide --batch 4; allowed: 1, 2, 4"),
        ("--seeds 1 1", "--seeds: [1, 1] has one twice"),
        ("--seed 1", "--seed: not possible here; allowed: --seeds"),
        ("--full-steps 0", "--full-steps: full_steps=0: must be"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_flags_are_named(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_options(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("ab", encoding="utf-8")
    arguments = flags(path, tmp_path / "out")
    assert three_configurations.main(arguments) == three_configurations.REFUSED
    assert "allowed: at most" in capsys.readouterr().err
