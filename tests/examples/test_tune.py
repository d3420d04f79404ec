"""The sweep over the settings of HybridOptimizer."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import gpt2_small
import tune
from lib.flags import INTERRUPTED
from lib.gpt2_records import BASELINE, HYBRID, RecordStore, RunRecord, StepRecord
from lib.sweeps import Score, Settings, Trial, scores
from triton_hybrid import HybridConfig
from tune import heat_values, parse_options, python_line, reporting_command

pytestmark = pytest.mark.usefixtures("own_cache")
Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]

RESULT = Path(tune.__file__).resolve().parent / "benchmarks" / "results" / "tune_tiny.json"
GRADIENTS = 9
GRID = (
    "--learning-rates 1e-3 1e-2 --confidence-thresholds 0 --horizons 1 2 "
    "--correction-intervals 1 2 --seeds 3 4"
)


def flags(text_folder: Path, output: Path, *more: str) -> list[str]:
    tiny = (
        f"--gradients {GRADIENTS} --device cpu --threads 1 --batch 1 --length 8 --vocabulary 300 "
        f"--held-out-windows 2 --warmup-steps 1 --full-steps 1 {GRID}"
    )
    return [*tiny.split(), "--data", str(text_folder), "--output", str(output), *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def made_up(trial: Trial, loss: float, gradients: int = GRADIENTS) -> RunRecord:
    stats = None if trial.settings is None else {"predicted_steps": 2.0}
    steps = [StepRecord("full", 1.0, 1.0, 0, gradients, loss)]
    return RunRecord(
        trial.name, trial.seed, gradients, 8, held_out_end=loss, stats=stats, steps=steps
    )


def pretend(monkeypatch: Patch) -> list[Trial]:
    """Replaces training by a formula, and returns the list of what was trained."""
    done: list[Trial] = []

    def run_trial(trial: Trial, *_: object) -> RunRecord:
        done.append(trial)
        loss = 5 + abs(math.log10(trial.learning_rate) + 3) + 0.1 * (trial.seed == 4)
        settings = trial.settings
        if settings is not None:
            loss += 0.01 * settings.max_predict_steps - 0.02 * settings.correction_interval
        return made_up(trial, loss)

    monkeypatch.setattr(tune, "run_trial", run_trial)
    return done


def test_a_sweep_finds_settings_and_leaves_its_files(
    text_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "sweep"
    more = ("--learning-rates", "1e-2", "--seeds", "3", "--horizons", "2")
    assert tune.main(flags(text_folder, output, *more)) == 0
    content = read(output / "results.json")
    assert content["complete"]
    assert content["tuning_seeds"] == [3]
    assert len(content["runs"]) == 1 + 2
    assert {run["gradients"] for run in content["runs"]} == {GRADIENTS}
    assert all(2 < run["held_out"] < 7 for run in content["runs"])
    predicted = [score["statistics"]["predicted_steps"] for score in content["hybrid"]]
    assert all(count > 0 for count in predicted)
    best = content["best"]
    assert best["held_out_mean"] == min(score["held_out_mean"] for score in content["hybrid"])
    saved = HybridConfig.from_dict(read(output / "best_config.json"))
    assert eval(best["python"], {"HybridConfig": HybridConfig}) == saved
    assert (output / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert best["python"] in printed
    assert "These seeds chose the settings: results must be reported on others" in printed
    assert "--seeds 4 5 6" in printed
    assert content["versions"]["torch"]


@pytest.mark.filterwarnings("ignore:.*is not JSON")
def test_a_stopped_sweep_goes_on(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    done = pretend(monkeypatch)
    complete = tune.run_trial

    def stop(trial: Trial, *more: Any) -> RunRecord:
        if len(done) == 11:
            raise KeyboardInterrupt
        return complete(trial, *more)

    monkeypatch.setattr(tune, "run_trial", stop)
    command = flags(text_folder, tmp_path)
    assert tune.main(command) == INTERRUPTED
    assert "the same command goes on from here" in capsys.readouterr().out
    content = read(tmp_path / "results.json")
    assert not content["complete"]
    # What has no result from every seed is not compared.
    assert len(content["hybrid"]) == 1
    with (tmp_path / "finished.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"trial": {"na')
    monkeypatch.setattr(tune, "run_trial", complete)
    assert tune.main(command) == 0
    sweep = parse_options(command)
    assert done == sweep.trials
    assert "11 of them already done" in capsys.readouterr().out
    assert tune.main(command) == 0
    assert len(done) == len(sweep.trials)
    # Another batch size makes other results.
    assert tune.main([*command, "--batch", "2"]) == 0
    assert len(done) == 2 * len(sweep.trials)


def test_the_best_has_the_lowest_mean_over_the_seeds(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    pretend(monkeypatch)
    assert tune.main(flags(text_folder, tmp_path)) == 0
    content = read(tmp_path / "results.json")
    assert content["best"]["learning_rate"] == 1e-3
    assert content["best"]["held_out_mean"] == pytest.approx(5 + 0.05 + 0.02 - 0.04)
    config = content["best"]["hybrid_config"]
    assert (config["max_predict_steps"], config["correction_interval"]) == (2, 2)
    assert [score["learning_rate"] for score in content["adamw"]] == [1e-3, 1e-2]
    assert content["adamw"][0]["held_out_by_seed"] == pytest.approx([5.0, 5.1])


def test_rows_that_end_with_their_stretch_are_one_run(text_folder: Path, tmp_path: Path) -> None:
    sweep = parse_options(flags(text_folder, tmp_path))
    assert len(sweep.grid) == 8
    assert len(sweep.distinct) == 6
    assert Settings(1e-3, 0.0, 1, 2).canonical == Settings(1e-3, 0.0, 1, 1)
    assert len(sweep.trials) == 2 * (2 + 6)


@pytest.mark.parametrize(("over", "corner"), [("min", 5.0), ("mean", 5.5)])
def test_heat_map_reduces_what_is_no_axis(
    over: str, corner: float, text_folder: Path, tmp_path: Path
) -> None:
    axes = ("--heat-map", "learning_rate", "max_predict_steps", "--over", over)
    sweep = parse_options(flags(text_folder, tmp_path, *axes))
    found = [
        Score(s.learning_rate, s, (s.max_predict_steps + 3.0 + (s.correction_interval == 1),), {})
        for s in sweep.distinct
        if s.learning_rate == 1e-2
    ]
    rows = heat_values(sweep, found)
    # A horizon of one has one kind of row, whatever the interval.
    assert rows[0][1] == 5.0
    assert rows[1][1] == corner
    assert all(math.isnan(row[0]) for row in rows)


def test_scores_are_of_runs_with_equal_gradients_and_what_diverged_is_the_worst(
    text_folder: Path, tmp_path: Path
) -> None:
    more = ("--seeds", "3", "--learning-rates", "1e-2", "1e-3", "1e-4", "1e-5")
    sweep = parse_options(flags(text_folder, tmp_path, *more))
    path, surroundings = tmp_path / "finished.jsonl", {"text": "a", "betas": (1, 2)}
    store = RecordStore(path, surroundings)
    for rate, loss in ((1e-2, 4.0), (1e-3, math.inf), (1e-4, math.nan)):
        trial = Trial(BASELINE, 3, rate)
        store.add(asdict(trial), made_up(trial, loss))
    again = RecordStore(path, surroundings)
    found = [(score.learning_rate, score.mean) for score in scores(sweep, again, BASELINE)]
    assert found == [(1e-2, 4.0), (1e-3, math.inf), (1e-4, math.inf)]
    assert scores(sweep, again, HYBRID) == []
    assert RecordStore(path, {"text": "b"}).get(asdict(Trial(BASELINE, 3, 1e-2))) is None

    trial = Trial(BASELINE, 3, 1e-5)
    store.add(asdict(trial), made_up(trial, 4.0, GRADIENTS - 1))
    with pytest.raises(RuntimeError, match=f"did not take {GRADIENTS} gradients"):
        scores(sweep, store, BASELINE)


def test_muon_follows_the_learning_rate_unless_it_is_given(
    text_folder: Path, tmp_path: Path
) -> None:
    sweep = parse_options(flags(text_folder, tmp_path, "--base", "muon"))
    assert sweep.options(Trial(HYBRID, 3, 0.5)).muon_learning_rate == 0.5
    sweep = parse_options(flags(text_folder, tmp_path, "--base", "muon", "--muon-lr", "0.25"))
    assert sweep.options(Trial(HYBRID, 3, 0.5)).muon_learning_rate == 0.25


def test_python_line_and_command_say_what_was_chosen(text_folder: Path, tmp_path: Path) -> None:
    assert ast.parse(python_line(HybridConfig()))
    config = HybridConfig(predictor="linear", divergence_threshold=2.5, confidence_threshold=0.25)
    line = python_line(config)
    assert eval(line, {"HybridConfig": HybridConfig}) == config
    assert "max_predict_steps=4" in line
    assert "history" not in line
    sweep = parse_options(flags(text_folder, tmp_path, "--schedule", "linear"))
    chosen = Settings(2e-3, 0.25, 3, 2)
    command = reporting_command(sweep, chosen).split()
    options = gpt2_small.parse_options(command[2:])
    assert set(options.seeds).isdisjoint(sweep.flags.seeds)
    assert (options.learning_rate, options.schedule, options.drive) == (2e-3, "linear", "inline")
    assert options.hybrid == replace(sweep.base.hybrid, **chosen.hybrid)


def test_the_file_in_the_repository_is_a_whole_sweep() -> None:
    content = read(RESULT)
    assert content["complete"]
    sweep = parse_options([])
    assert content["tuning_seeds"] == list(sweep.flags.seeds)
    assert len(content["runs"]) == len(sweep.trials)
    assert HybridConfig.from_dict(content["best"]["hybrid_config"])
