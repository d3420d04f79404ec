"""The comparison of three configurations and their controls."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2LMHeadModel

import three_configurations
from lib import configurations_report as report
from lib import gpt2_records as records
from lib import gpt2_training
from lib.configurations_report import CONFIGURATIONS
from lib.flags import INTERRUPTED
from lib.gpt2_records import BASELINE, CONTROL, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT, RunRecord
from lib.text_data import TokenizedText, load_corpus, tokenize
from three_configurations import Plan, order, parse_options, run_configuration
from triton_hybrid import HybridConfig, HybridOptimizer

pytestmark = pytest.mark.usefixtures("own_cache")
Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]

STEPS = 14
CYCLE = "--warmup-steps 2 --full-steps 3 --confidence-threshold 0"
MADE_UP_BYTES = {"parameter_bytes": 10, "state_bytes_device": 20, "state_bytes_host": 4,
                 "memory_before": 50, "memory_peak": 300}  # fmt: skip


def flags(text_folder: Path, output: Path, *more: str) -> list[str]:
    tiny = "--device cpu --threads 1 --batch 4 --length 16 --held-out-windows 4 --vocabulary 300"
    tiny += f" {CYCLE}"
    steps = () if "--steps" in more else ("--steps", str(STEPS))
    return [*tiny.split(), *steps, "--data", str(text_folder), "--output", str(output), *more]


def plan_and_text(text_folder: Path, output: Path, *more: str) -> tuple[Plan, TokenizedText]:
    plan = parse_options(flags(text_folder, output, *more))
    return plan, tokenize(load_corpus([text_folder]), 300)


def results(output: Path) -> Any:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def made_up(configuration: str, seed: int, seconds: float, held_out: float) -> RunRecord:
    steps = [
        records.StepRecord("full", seconds, seconds, 100, 1, 5.0),
        records.StepRecord("predict", 0.0, 0.0, 200, 1, None),
    ]
    ends = {"held_out_start": 6.0, "held_out_end": held_out}
    return RunRecord(configuration, seed, 2, 64, steps=steps, **ends, **MADE_UP_BYTES)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*is not JSON")
def test_end_to_end_and_resume(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    trained: list[tuple[str, int]] = []
    batches: dict[tuple[str, int], list[torch.Tensor]] = {}

    def recorded(configuration: str, seed: int, *rest: Any) -> RunRecord:
        if interrupt_at == len(trained):
            raise KeyboardInterrupt
        trained.append((configuration, seed))
        return run_configuration(configuration, seed, *rest)

    draw = gpt2_training.WindowSampler.draw

    def recorded_draw(sampler: gpt2_training.WindowSampler) -> torch.Tensor:
        batch = draw(sampler)
        batches.setdefault(trained[-1], []).append(batch)
        return batch

    monkeypatch.setattr(three_configurations, "run_configuration", recorded)
    monkeypatch.setattr(gpt2_training.WindowSampler, "draw", recorded_draw)
    arguments = flags(text_folder, tmp_path, "--seeds", "3", "7")

    interrupt_at = 7
    assert three_configurations.main(arguments) == INTERRUPTED
    assert "goes on from here" in capsys.readouterr().out
    assert not results(tmp_path)["complete"]

    # A line cut short is done again, and swallows nothing.
    with (tmp_path / "finished.jsonl").open("a", encoding="utf-8") as file:
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
        assert set(hybrid["steps"]) == set(records.STEP_FIELDS)
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
    content = {"versions": {"torch": "1"}, "betas": (1, 2)}
    plan = parse_options(flags(text_folder, tmp_path))
    store = records.RecordStore(tmp_path / "finished.jsonl", content)
    store.add(plan.key(BASELINE, 0, 10), run)

    again = records.RecordStore(tmp_path / "finished.jsonl", content)
    assert again.get(plan.key(BASELINE, 0, 10)) == run
    other_plan = parse_options(flags(text_folder, tmp_path, "--lr", "0.5"))
    for other in (
        other_plan.key(BASELINE, 0, 10),
        plan.key(BASELINE, 1, 10),
        plan.key(BASELINE, 0, 11),
        plan.key(HYBRID, 0, 10),
    ):
        assert again.get(other) is None
    elsewhere = records.RecordStore(
        tmp_path / "finished.jsonl", {**content, "versions": {"torch": "2"}}
    )
    assert elsewhere.get(plan.key(BASELINE, 0, 10)) is None
    fine = parse_options(flags(text_folder, tmp_path, "--precision", "fp16", "--seeds", "0", "9"))
    assert again.get(fine.key(BASELINE, 0, 10)) == run


def test_every_configuration_goes_first_once() -> None:
    orders = [order(index) for index in range(4)]
    assert {found[0] for found in orders} == {BASELINE, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT}
    for found in orders:
        assert sorted(found) == sorted(CONFIGURATIONS)
        assert found[-1] == CONTROL


def test_needs_backward_holds_for_a_whole_window(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    plan, text = plan_and_text(text_folder, tmp_path)
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
    run = run_configuration(MEMORY_OPTIMISED, 0, STEPS, plan, text)

    # The warm-up's gradient is thrown away before the first step.
    windows = "|".join(events[events.index("needs_backward") :]).split("needs_backward|")[1:]
    assert len(windows) == STEPS
    phases = [step.phase for step in run.steps]
    assert "predict" in phases
    for window, phase in zip(windows, phases, strict=True):
        passes = 0 if phase == "predict" else 4
        expected = ["forward 1"] * passes + [f"step {phase}"]
        assert window.strip("|").split("|") == expected


def test_accumulated_gradient_is_that_of_the_whole_batch(text_folder: Path, tmp_path: Path) -> None:
    plan, text = plan_and_text(text_folder, tmp_path, "--steps", "3")
    losses = []
    for micro_batches in (1, 4):
        record = gpt2_training.RunRecord(HYBRID, 0, 3, 64)
        gpt2_training.train(record, plan.base, text, micro_batches=micro_batches)
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
    text_folder: Path, tmp_path: Path, monkeypatch: Patch, refusal: Any
) -> None:
    monkeypatch.setattr(gpt2_training, "evaluate", lambda model, windows: math.nan)
    plan, text = plan_and_text(text_folder, tmp_path, "--steps", "1")
    message = refusal(lambda: run_configuration(HYBRID, 5, 1, plan, text))
    assert re.search(r"hybrid, seed 5: .* nan, .*--lr", message)
    arguments = flags(text_folder, tmp_path, "--steps", "1")
    assert "baseline, seed 0" in refusal(lambda: three_configurations.main(arguments))
    assert not (tmp_path / "finished.jsonl").exists()


def test_runs_are_compared_seed_by_seed() -> None:
    runs = {
        name: [made_up(name, seed, 2.0 + seed + index, 5.0 + index / 10) for seed in (0, 1)]
        for index, name in enumerate(CONFIGURATIONS)
    }
    console = Console(width=report.WIDTH, record=True)
    console.print(report.result_table(runs, ""))
    found = report.comparisons(runs)
    console.print(report.comparison_table(found))
    assert "…" not in console.export_text(), "nothing is cut off"
    entry = next(e for e in found if (e["configuration"], e["reference"]) == (HYBRID, BASELINE))
    assert entry["speed_up_wall_clock"].values == pytest.approx((2 / 3, 3 / 4))
    assert entry["held_out_percent_above"].mean == pytest.approx(2)
    # On a CPU what is offloaded counts: it lies in the same memory.
    assert runs[HYBRID][0].kept_bytes == 44


def test_defaults() -> None:
    plan = parse_options([])
    source = HybridConfig.quick_validation().to_dict()
    assert {**plan.base.hybrid.to_dict(), "inline": True} == source
    assert plan.base.drive == "stepped"
    assert (plan.base.model, plan.flags.seeds, plan.base.threads) == ("tiny", (0, 1, 2), 1)
    memory = plan.options(MEMORY_OPTIMISED)
    assert (memory.precision, memory.hybrid.offload) == ("bf16", "cpu")
    assert plan.windows(MEMORY_OPTIMISED)["micro_batches"] == 4
    for name in (BASELINE, HYBRID, CONTROL):
        assert plan.options(name) is plan.base
        assert plan.windows(name)["micro_batches"] == 1
    assert plan.base.precision == "fp32"
    assert plan.base.hybrid.offload == "none"
    small = parse_options(["--model", "small"]).base
    assert (small.steps, small.learning_rate, small.schedule) == (50, 6e-4, "constant")
