"""The main job's example: AdamW and HybridOptimizer on GPT-2."""

from __future__ import annotations

import itertools
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from transformers import GPT2LMHeadModel

import gpt2_small
from gpt2_small import parse_options
from lib import gpt2_training, text_data
from lib.gpt2_records import RunRecord

pytestmark = pytest.mark.usefixtures("own_cache")
Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]

STEPS = 12
CYCLE = "--warmup-steps 2 --full-steps 3 --confidence-threshold 0"
TEXT = text_data.TokenizedText(torch.zeros(1), torch.zeros(1), 300, 0, "")


def flags(text_folder: Path, output: Path, *more: str, steps: int = STEPS) -> list[str]:
    # One thread: several are slower here, and much slower beside other work.
    tiny = "--model tiny --device cpu --threads 1 --batch 2 --length 16 --held-out-windows 4"
    tiny += f" --vocabulary 300 --steps {steps} {CYCLE} --data {text_folder} --output {output}"
    return [*tiny.split(), *more]


def results(output: Path) -> Any:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_gpt2_small_has_the_size_of_gpt2_small() -> None:
    text = replace(TEXT, vocabulary=50_257)
    assert gpt2_training.parameter_count(parse_options([]), text) == 124_439_808


def test_both_runs_see_the_same_batches_and_leave_results(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    samplers: list[list[torch.Tensor]] = []

    class Recorder(text_data.WindowSampler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.drawn: list[torch.Tensor] = []
            samplers.append(self.drawn)

        def draw(self) -> torch.Tensor:
            self.drawn.append(super().draw())
            return self.drawn[-1]

    monkeypatch.setattr(gpt2_training, "WindowSampler", Recorder)
    assert gpt2_small.main(flags(text_folder, tmp_path, "--controls")) == 0

    content = results(tmp_path)
    assert content["complete"]
    (seed,) = content["seeds"]
    assert list(seed["runs"]) == ["baseline", "hybrid", "control"]
    assert {run["base"] for run in seed["runs"].values()} == {content["options"]["base"]}
    assert content["options"]["base"] == "adamw"
    hybrid, baseline, control = (seed["runs"][name] for name in ("hybrid", "baseline", "control"))
    # Each run draws from its own sampler, and once from another to warm up.
    hybrid_batches, hybrid_warm_up, baseline_batches, baseline_warm_up = samplers[:4]
    assert len(baseline_batches) == baseline["gradient_evaluations"] == STEPS
    assert len(hybrid_batches) == hybrid["gradient_evaluations"] < STEPS
    for one, other in zip(hybrid_batches, baseline_batches, strict=False):
        assert torch.equal(one, other)
    assert torch.equal(hybrid_warm_up[0], baseline_warm_up[0])
    assert len(hybrid_warm_up) == len(baseline_warm_up) == 1

    assert control["gradient_evaluations"] == hybrid["gradient_evaluations"]
    assert seed["control_source"] == "own run"
    assert hybrid["stats"]["gradient_evaluations"] == hybrid["gradient_evaluations"]
    assert baseline["stats"] is None
    for run in (hybrid, baseline, control):
        assert run["held_out_loss_start"] == baseline["held_out_loss_start"]
        assert run["training_loss_first"] == baseline["training_loss_first"]
        assert run["held_out_loss_end"] < run["held_out_loss_start"]
        assert run["memory_peak_bytes"] > 0
        assert len(run["steps"]) == run["steps_taken"] == run["planned_steps"]
    for step in hybrid["steps"]:
        assert (step["loss"] is None) == (step["phase"] == "predict")
    assert {step["phase"] for step in hybrid["steps"]} >= {"warmup", "full", "predict"}
    assert seed["speed_up_wall_clock"] == pytest.approx(baseline["seconds"] / hybrid["seconds"])
    assert content["versions"]["torch"] == torch.__version__
    assert content["options"]["hybrid"]["warmup_steps"] == 2
    assert content["data"]["split"] == "by file"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert len(capsys.readouterr().out.splitlines()) < 60


WHAT = ("phase", "loss")


def as_process(rank: int, port: int, arguments: list[str]) -> None:
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in started.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    assert gpt2_small.main(arguments) == 0


def test_processes_share_a_batch_and_train_as_one(
    text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What torchrun starts, without importing everything twice more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "spawn" if torch.cuda.is_available() else "fork"
    given = port, flags(text_folder, tmp_path / "TIME")
    mp.start_processes(as_process, given, 2, start_method=method)  # type: ignore[no-untyped-call]
    printed = capfd.readouterr().out
    assert printed.count("Gradient evaluations") == printed.count("Results:") == 1
    (folder,) = tmp_path.iterdir()
    content = results(folder)
    assert (content["complete"], content["processes"]) == (True, 2)
    (seed,) = content["seeds"]
    for name in ("baseline", "hybrid"):
        several, one = seed["runs"][name], seed["runs"][f"{name}_one_process"]
        assert (several["processes"], one["processes"]) == (2, 1)
        assert several["optimizer"] == one["optimizer"]
        assert several["held_out_loss_end"] == pytest.approx(one["held_out_loss_end"], rel=1e-5)
        phases, losses = ([[s[x] for s in r["steps"]] for r in (several, one)] for x in WHAT)
        assert phases[0] == phases[1]
        # A predicted step has none on either side.
        assert [x or 0.0 for x in losses[0]] == pytest.approx([x or 0.0 for x in losses[1]], 1e-5)
    assert seed["runs"]["hybrid"]["stats"]["predicted_steps"] > 0
    for words in ("times one process", "against one process", "x 1", "x 2"):
        assert words in printed


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: Patch, refusal: Any) -> None:
    for name, number in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(number))
    message = refusal(lambda: gpt2_small.main(["--device", "cpu"]))
    assert "argument --batch: 4 is not possible; allowed: multiples of 3, the processes" in message


def test_the_baseline_on_its_way_is_the_control(text_folder: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, more in (("free", ()), ("own", ("--controls",))):
        assert gpt2_small.main(flags(text_folder, tmp_path / name, *more)) == 0
        (seed,) = results(tmp_path / name)["seeds"]
        outcomes.append(seed["runs"]["control"]["held_out_loss_end"])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


def test_adaptive_windows_take_fewer_batches_and_show_why(
    text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ("--accumulation", "3", "--adaptive", "--drive", "inline")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    (seed,) = results(tmp_path)["seeds"]
    hybrid, baseline = (seed["runs"][name] for name in ("hybrid", "baseline"))
    assert baseline["windows"] == [3] * STEPS
    assert hybrid["windows"][0] == 3
    assert sum(hybrid["windows"]) == hybrid["stats"]["micro_batches"] < 3 * STEPS
    assert len(hybrid["noise_scales"]) == hybrid["steps_taken"] == STEPS
    assert hybrid["stats"]["micro_batches_saved"] == 3 * STEPS - sum(hybrid["windows"])
    assert hybrid["training_loss_first"] == pytest.approx(baseline["training_loss_first"])
    assert "noise scale at the end" in capsys.readouterr().out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_fixed_window_is_the_same_for_both(text_folder: Path, tmp_path: Path) -> None:
    more = ("--accumulation", "2", "--predictor", "none", "--drive", "inline")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    (seed,) = results(tmp_path)["seeds"]
    ends = [seed["runs"][name]["held_out_loss_end"] for name in ("hybrid", "baseline")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert seed["runs"]["hybrid"]["windows"] == [2] * STEPS


def test_muon_is_shown_beside_muon_alone(
    text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ("--base", "muon", "--muon-lr", "0.001")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    content = results(tmp_path)
    assert content["options"]["base"] == "muon"
    assert content["options"]["muon_learning_rate"] == 0.001
    (seed,) = content["seeds"]
    runs = seed["runs"]
    bases = {name: run["base"] for name, run in runs.items()}
    assert bases == {"baseline": "adamw", "base_alone": "muon", "hybrid": "muon",
                     "control": "adamw"}  # fmt: skip
    assert all("Muon" in runs[name]["optimizer"] for name in ("base_alone", "hybrid"))

    alone, hybrid = runs["base_alone"], runs["hybrid"]
    assert alone["gradient_evaluations"] == runs["baseline"]["gradient_evaluations"] == STEPS
    assert alone["stats"]["predictor"] == "none"
    assert hybrid["gradient_evaluations"] < STEPS
    # The slow EMA is the first gradient, and takes part in the momentum from the second step on.
    losses = {name: [step["loss"] for step in run["steps"]] for name, run in runs.items()}
    assert losses["base_alone"][0] == losses["hybrid"][0] == losses["baseline"][0]
    assert losses["base_alone"][1] == pytest.approx(losses["hybrid"][1], rel=1e-4)
    for one, other in itertools.combinations(("base_alone", "hybrid", "baseline"), 2):
        assert losses[one][2:4] != losses[other][2:4]

    end = hybrid["held_out_loss_end"]
    on_its_way = alone["held_out_loss_after_gradients"][str(hybrid["gradient_evaluations"])]
    for key, other in (
        ("held_out_percent_above_base_alone", alone["held_out_loss_end"]),
        ("held_out_percent_above_base_alone_as_many_gradients", on_its_way),
    ):
        assert seed[key] == pytest.approx(100 * (end / other - 1))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    table = printed[printed.index("\nSeed 0 ") :].splitlines()
    assert max(len(line.rstrip()) for line in table if str(tmp_path) not in line) <= 80


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("--drive inline --only hybrid --schedule linear --precision bf16", "hybrid"),
        ("--base muon --only baseline", "baseline base_alone"),
        ("--base muon --only hybrid --drive inline", "hybrid"),
        ("--base muon --schedule linear --precision bf16", "baseline base_alone hybrid"),
        (
            "--base muon --schedule linear --controls --max-predict-steps 1",
            "baseline base_alone hybrid control",
        ),
    ],
)
def test_other_flags(text_folder: Path, tmp_path: Path, more: str, names: str) -> None:
    assert gpt2_small.main(flags(text_folder, tmp_path, *more.split())) == 0
    (seed,) = results(tmp_path)["seeds"]
    assert list(seed["runs"]) == names.split()
    for name, run in seed["runs"].items():
        assert run["complete"]
        assert run["held_out_loss_end"] < run["held_out_loss_start"]
        assert name != "hybrid" or (run["gradient_evaluations"] == STEPS) == ("inline" in more)
    # The rate of a run of all steps has not decayed yet where it would be compared.
    assert seed["held_out_percent_above_base_alone_as_many_gradients"] is None


def test_only_runs_of_hybrid_optimizer_have_a_muon_group() -> None:
    muon = [("muon", 0.01), ("adamw", 0.01)]
    own_rate = [("muon", 0.02), ("adamw", 0.01)]
    for more, hybrids in (
        ("", [("adamw", 0.01)]),
        ("--base muon", muon),
        ("--base muon --muon-lr 0.02", own_rate),
    ):
        options = parse_options(f"--model tiny --lr 0.01 {more}".split())
        model = GPT2LMHeadModel(gpt2_training.model_config(options, TEXT))
        for name in ("baseline", "control", "base_alone", "hybrid"):
            groups = gpt2_training.parameter_groups(name, model, options)
            found = gpt2_training.build_optimizer(name, groups, options)[0].param_groups
            trained = {id(param) for group in found for param in group["params"]}
            assert trained == {id(param) for param in model.parameters()}
            expected = hybrids if name in ("base_alone", "hybrid") else [("torch", 0.01)]
            assert [(group.get("base", "torch"), group["lr"]) for group in found] == expected


def test_rehearsal_leaves_the_model_alone() -> None:
    options = parse_options(["--model", "tiny", "--device", "cpu", "--base", "muon"])
    model = GPT2LMHeadModel(gpt2_training.model_config(options, TEXT))
    before = [param.detach().clone() for param in model.parameters()]
    for name in ("baseline", "base_alone", "hybrid"):
        gpt2_training.rehearse(name, model, options)
    assert all(param.grad is None for param in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_interruption_leaves_what_was_done(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    counter = itertools.count()
    original = gpt2_training.train
    before: list[dict[str, Any]] = []

    def train(record: RunRecord, *arguments: Any, **keywords: Any) -> None:
        if record.name == "baseline":
            before.append(results(tmp_path))

            def report(record: RunRecord) -> None:
                if next(counter) == 3:
                    raise KeyboardInterrupt

            keywords["report"] = report
        original(record, *arguments, **keywords)

    monkeypatch.setattr(gpt2_small, "train", train)
    assert gpt2_small.main(flags(text_folder, tmp_path, "--seeds", "1", "2")) == 130
    content = results(tmp_path)
    assert not content["complete"]
    (seed,) = content["seeds"]
    assert seed["runs"]["hybrid"]["complete"]
    assert before[0]["seeds"][0]["runs"]["hybrid"] == seed["runs"]["hybrid"]
    assert not before[0]["complete"]
    assert seed["runs"]["baseline"]["steps_taken"] == 4
    assert seed["runs"]["baseline"]["held_out_loss_end"] is None
    assert seed["speed_up_wall_clock"] is None
    assert (tmp_path / "loss.png").is_file()
    assert f"4 of {STEPS}" in capsys.readouterr().out


def test_gradients_to_the_final_loss_of_adamw_are_counted(
    text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = ("--base", "muon", "--to-loss", "--seeds", "0", "1")
    assert gpt2_small.main(flags(text_folder, tmp_path, *more)) == 0
    for seed in results(tmp_path)["seeds"]:
        goal = min(seed["runs"]["baseline"]["held_out_loss_after_gradients"].values())
        for name in ("baseline", "base_alone", "hybrid"):
            run = seed["runs"][name]
            after = {int(n): loss for n, loss in run["held_out_loss_after_gradients"].items()}
            assert list(after) == list(range(1, run["gradient_evaluations"] + 1))
            needed = run["gradients_to_baseline_loss"]
            if needed is None:
                assert name != "baseline"
                assert min(after.values()) > goal
                continue
            assert after[needed] <= goal < min([after[n] for n in range(1, needed)], default=9e9)
            steps = [step for step in run["steps"] if step["gradients"] < needed]
            seconds = sum(step["seconds"] for step in run["steps"][: len(steps) + 1])
            assert run["seconds_to_baseline_loss"] == pytest.approx(seconds)
    assert "To AdamW's lowest held-out loss" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["--schedule linear", "--only hybrid"])
def test_to_loss_needs_runs_that_are_alike(more: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--to-loss", *more.split()])
    assert f"with {more}" in capsys.readouterr().err.replace("\n", " ")
