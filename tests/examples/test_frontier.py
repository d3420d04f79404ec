"""The harness of the frontier: tasks, optimizers, runs, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from frontier import command, runs
from frontier.drivers import rate_factor
from frontier.optimizers import OPTIMIZERS, make_optimizer, require_package
from frontier.runs import run, run_all
from frontier.tasks import TASKS, build_task, text
from frontier.training import Run, RunSpec
from lib.run_store import RunStore

SMALL_LANGUAGE = {"layers": 1, "width": 16, "heads": 2, "batch": 2, "length": 16, "windows": 4}
TINY: dict[str, dict[str, Any]] = {
    "lm": SMALL_LANGUAGE, "finetune": SMALL_LANGUAGE, "digits-cnn": {}, "tabular": {},
    "digits-fullbatch": {"width": 8}, "pictures": {}, "pde": {"width": 8, "points": 16},
}  # fmt: skip
RESULTS = Path(command.__file__).parents[1] / "results" / "frontier"
FIELDS = {
    "key", "task", "task_options", "optimizer", "optimizer_options", "lr", "budget", "seed",
    "schedule", "gradient_evaluations", "metric", "final", "held_out_final", "train_final",
    "curve", "seconds", "diverged", "parameters", "stats", "hardware", "versions", "planted",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real texts, cut; a short recipe; and a cache that nobody else uses."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(text, "PRETRAINING_STEPS", 3)
    yield
    patch.undo()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "runs.jsonl"


def tiny(task: str, optimizer: str = "adamw", **changes: Any) -> RunSpec:
    values: dict[str, Any] = {"lr": 1e-3, "budget": 6, "seed": 0, "task_options": TINY.get(task)}
    return RunSpec(task=task, optimizer=optimizer, **(values | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return RunStore(path).lines


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what depends on the clock."""
    kept = {name: value for name, value in line.items() if name != "seconds"}
    kept["curve"] = [[gradients, loss] for gradients, _, loss in line["curve"]]
    if line["stats"] is not None:
        kept["stats"] = {n: v for n, v in line["stats"].items() if n != "seconds_per_phase"}
    return kept


# ------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TINY)
def test_a_task_is_decided_by_its_seed(name: str) -> None:
    assert set(TINY) == set(TASKS)
    task, again = build_task(name, TINY[name]), build_task(name, TINY[name])
    one, same = task.model(3), again.model(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    # Out of order, and with other draws between: the index alone counts.
    late, early = task.batch(3, 7), task.batch(3, 0)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(early, again.batch(3, 0)))
    assert all(torch.equal(a, b) for a, b in zip(late, again.batch(3, 7)))
    assert task.held_out(one) == again.held_out(same)
    assert math.isfinite(task.held_out(one, quick=True))
    assert task.loss_scale in ("linear", "log")
    assert task.data()


@pytest.mark.parametrize("name", TINY)
def test_weights_and_batches_differ_by_seed_and_index(name: str) -> None:
    task = build_task(name, TINY[name])
    if not task.full_batch:
        batch = task.batch(3, 7)
        for other in (task.batch(4, 7), task.batch(3, 8)):
            assert not torch.equal(batch[0], other[0])
    before = torch.get_rng_state()
    pairs = zip(task.model(0).parameters(), task.model(1).parameters())
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert any(not torch.equal(a, b) for a, b in pairs) == (name != "finetune")


def test_language_model_defaults() -> None:
    task = build_task("lm", {})
    assert sum(param.numel() for param in task.model(0).parameters()) == 366_432
    inputs, targets = task.batch(0, 0)
    assert inputs.shape == targets.shape == (16, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    inputs, _ = build_task("lm", {"batch": 4}).batch(0, 0)
    assert inputs.numel() == 256
    # Below the logarithm of 256: the tied output favours a repetition, and spaces repeat.
    assert 5.2 < task.held_out(task.model(0)) < math.log(256)


def test_fine_tuning_text_does_not_leak() -> None:
    training, held_out = text.reference_text()[:2]
    parts = {part for part in bytes(held_out.tolist()).split(b"\n\n") if len(part) > 100}
    trained = bytes(training.tolist())
    assert len(parts) > 20
    assert not any(b"\n\n" + part + b"\n\n" in trained for part in parts)


def test_poisson_network_knows_its_second_derivative() -> None:
    task = build_task("pde", TINY["pde"])
    model = task.model(0).double()
    x = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    value, second = model(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(second, expected)


# -------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_counts(name: str) -> None:
    entry = OPTIMIZERS[name]
    if entry.package is not None:
        pytest.importorskip(entry.package)
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = {"warmup_steps": 2, "full_steps": 1} if name.startswith("hybrid") else {}
    lr = 1.0 if name == "lbfgs" else 1e-2 * entry.rate_scale
    current = Run(tiny("digits-fullbatch", name, lr=lr, budget=20, optimizer_options=config))
    seen = 0

    def count(grad: torch.Tensor) -> None:
        nonlocal seen
        seen += 1

    next(current.model.parameters()).register_hook(count)  # type: ignore[no-untyped-call]
    start = current.training_loss()
    current.train()
    line = json.loads(json.dumps(current.line(), allow_nan=False))
    assert set(line) >= FIELDS
    assert seen == line["gradient_evaluations"] == round(20 * entry.budget_factor)
    assert line["budget"] == 20
    assert line["final"] == line["train_final"] < start
    assert not line["diverged"]
    assert [gradients for gradients, _, _ in line["curve"]][-1] == seen
    assert line["planted"] == entry.planted
    assert (line["planted"] is not None) == (name in ("adamw-x1.5", "adamw-again"))
    if name.endswith("-none"):
        assert line["stats"]["predicted_steps"] == 0
    elif name in ("hybrid", "hybrid-slow_ema", "hybrid-muon", "hybrid-random", "hybrid-tail-off"):
        assert line["stats"]["predicted_steps"] > 0
        assert line["settings"]["hybrid"]["warmup_steps"] == 2


def test_planted_runs_differ_from_adamw_as_they_should() -> None:
    adamw = run(tiny("tabular"))
    none = run(tiny("tabular", "hybrid-none"))
    assert none["final"] == pytest.approx(adamw["final"], rel=1e-5)
    more = run(tiny("tabular", "adamw-x1.5"))
    assert more["final"] == run(tiny("tabular", budget=9))["final"] != adamw["final"]
    again = run(tiny("tabular", "adamw-again"))
    assert again["seed"] == 0
    assert again["final"] == run(tiny("tabular", seed=1000))["final"] != adamw["final"]
    gain = run(tiny("tabular", "adamw-gain", optimizer_options={"gain": 2.0}))
    assert gain["final"] == run(tiny("tabular", lr=2e-3))["final"]


def test_tail_off_predicts_before_the_tail_alone() -> None:
    options = {"warmup_steps": 2, "full_steps": 1, "predictor": "slow_ema"}
    spec = tiny("digits-cnn", "hybrid-tail-off", budget=30, optimizer_options=options)
    whole = run(tiny("digits-cnn", "hybrid", budget=30, optimizer_options=options))
    cut = run(spec)
    assert 0 < cut["stats"]["predicted_steps"] < whole["stats"]["predicted_steps"]
    assert cut["stats"]["gradient_evaluations"] < cut["gradient_evaluations"] == 30
    none = run(tiny("digits-cnn", budget=30))
    options["tail"] = 1.0
    off = run(tiny("digits-cnn", "hybrid-tail-off", budget=30, optimizer_options=options))
    assert off["stats"]["predicted_steps"] == 0
    assert off["final"] == pytest.approx(none["final"], rel=1e-4)


def test_random_moves_keep_the_norm() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    options = {"warmup_steps": 1, "full_steps": 1, "predictor": "slow_ema"}
    driver = make_optimizer("hybrid-random", model, 1e-2, options, 10, seed=5)
    moves: list[tuple[float, float]] = []
    replace = driver._replace_move  # type: ignore[attr-defined]

    def watched(param: nn.Parameter, start: torch.Tensor) -> None:
        before = (param - start).detach().clone()
        replace(param, start)
        after = (param - start).detach()
        moves.append((float(before.norm()), float(after.norm())))
        if float(before.norm()) > 0:
            assert not torch.allclose(before, after, rtol=0.1)

    driver._replace_move = watched  # type: ignore[attr-defined]
    for _ in range(8):
        driver.zero_grad()
        model(torch.ones(4, 20)).square().mean().backward()
        driver.step()
    assert max(before for before, _ in moves) > 0
    for before, after in moves:
        assert after == pytest.approx(before, rel=1e-3, abs=1e-7)


def test_schedules() -> None:
    for schedule in ("linear", "cosine"):
        factors = [rate_factor(schedule, index, 400) for index in range(400)]
        assert factors[:3] == [0.025, 0.05, pytest.approx(0.075)]
        assert max(factors) == factors[39] == factors[40] == 1.0
        assert 0 < factors[-1] < 0.01
        assert all(a >= b for a, b in pairwise(factors[39:]))
    assert rate_factor("linear", 220, 400) == pytest.approx(0.5)
    assert rate_factor("constant", 399, 400) == 1.0


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chess", {"task_options": {}}, "task 'chess': must be one of"),
    ("lm", {"task_options": {"depth": 3}}, "option 'depth' of task 'lm': must be one of"),
    ("lm", {"task_options": {"layers": 0}}, "layers=0: must be an integer >= 1"),
    ("lm", {"task_options": {"layers": 1.5}}, "layers=1.5: must be of type int"),
    ("lm", {"task_options": {"width": 100}}, "width=100: must be a multiple of heads=3"),
    ("lm", {"task_options": {"device": "abacus"}}, "device='abacus': must be 'cpu' or 'cuda'"),
    ("lm", {"optimizer": "sgd"}, "optimizer 'sgd': must be one of"),
    ("lm", {"optimizer_options": {"momentum": 0.9}}, "option 'momentum' of optimizer 'adamw'"),
    ("lm", {"optimizer": "hybrid-none", "optimizer_options": {"predictor": "auto"}}, "'predictor'"),
    ("lm", {"optimizer": "lbfgs"}, "'lbfgs': needs a full-batch task, not 'lm'"),
    ("lm", {"lr": 0.0}, "lr="),
    ("lm", {"budget": 0}, "budget="),
    ("lm", {"seed": -1}, "seed="),
    ("lm", {"schedule": "steps"}, "schedule="),
]


@pytest.mark.parametrize(("task", "changes", "message"), WRONG)
def test_what_cannot_be_run_is_refused(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(task, **changes).check()


def test_a_missing_peer_names_its_extra() -> None:
    with pytest.raises(RuntimeError, match=r"not_there is not installed; .*'peers'"):
        require_package("not_there")
    for task in TASKS.values():
        for entry in OPTIMIZERS.values():
            assert len(entry.grid(task.learning_rates)) >= 4, "enough rates to count as tuned"


# -------------------------------------------------------------------------------------- runs


def test_a_run_repeats_bit_for_bit() -> None:
    assert comparable(run(tiny("lm", "hybrid"))) == comparable(run(tiny("lm", "hybrid")))


def test_a_key_is_stable_and_counts_every_field() -> None:
    spec = tiny("tabular")
    assert spec.key == tiny("tabular").key == RunSpec(**dataclasses.asdict(spec)).key
    changes: dict[str, Any] = {
        "task": "pde", "optimizer": "hybrid", "lr": 2e-3, "budget": 7, "seed": 1,
        "schedule": "cosine", "task_options": {"batch": 32}, "optimizer_options": {"eps": 1e-7},
    }  # fmt: skip
    others = [dataclasses.replace(spec, **{name: value}) for name, value in changes.items()]
    assert len({spec.key, *(other.key for other in others)}) == 1 + len(others)


def test_the_files_of_runs_in_the_repository_are_continued() -> None:
    for path in RESULTS.glob("*.jsonl"):
        for line in RunStore(path).lines:
            fields = {field.name: line[field.name] for field in dataclasses.fields(RunSpec)}
            assert RunSpec(**fields).key == line["key"]


def test_a_diverged_run_is_a_line_too() -> None:
    line = run(tiny("digits-fullbatch", lr=1e38, budget=24))
    assert line["diverged"]
    assert line["final"] is None
    assert not any(value is math.nan for point in line["curve"] for value in point)
    json.dumps(line, allow_nan=False)


def test_finished_runs_are_not_run_again_and_what_was_cut_off_is(path: Path) -> None:
    specs = [tiny("tabular", seed=seed) for seed in (0, 1)]
    assert run_all(specs, path) == 2
    written = path.read_bytes()
    assert run_all(specs, path) == 0
    assert path.read_bytes() == written
    assert run_all([*specs, tiny("tabular", seed=2, budget=9)], path) == 1
    assert [line["seed"] for line in lines_of(path)] == [0, 1, 2]
    path.write_bytes(written[:-20])
    with pytest.warns(UserWarning, match="not JSON"):
        assert run_all(specs, path) == 1
    with pytest.warns(UserWarning, match="not JSON"):
        assert {line["seed"] for line in lines_of(path)} == {0, 1}


def test_processes_give_the_same_bits(path: Path) -> None:
    specs = [tiny("tabular", "hybrid", seed=seed, budget=10 + seed) for seed in (0, 1)]
    assert run_all(specs, path, workers=2) == 2
    lines = {line["seed"]: line for line in lines_of(path)}
    alone = run(specs[0])
    for name in ("key", "final", "held_out_final", "train_final", "settings"):
        assert lines[0][name] == alone[name]
    assert lines[0]["hardware"]["threads"] == 1


def test_what_fails_or_is_interrupted_leaves_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: dict[int, BaseException] = {1: ArithmeticError("no luck"), 3: KeyboardInterrupt()}

    def fails_for_some(spec: RunSpec) -> dict[str, Any]:
        if spec.seed in errors:
            raise errors[spec.seed]
        return run(spec)

    monkeypatch.setattr(runs, "run", fails_for_some)
    specs = [tiny("tabular", seed=seed) for seed in (0, 1, 2)]
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed.*\n.*seed 1: ArithmeticError"):
        run_all(specs, path)
    assert {line["seed"] for line in lines_of(path)} == {0, 2}
    # The longest is run first.
    with pytest.raises(KeyboardInterrupt):
        run_all([tiny("tabular", seed=3), tiny("tabular", seed=4, budget=8)], path)
    assert {line["seed"] for line in lines_of(path)} == {0, 2, 4}


# ----------------------------------------------------------------------------------- command


def flags(path: Path, more: str) -> list[str]:
    fixed = f"run --tasks tabular --optimizers adamw --budgets 5 --output {path}"
    return [*fixed.split(), *more.split()]


def test_command_tunes_then_runs_the_best_rate(path: Path) -> None:
    more = "--lrs 1e-5 1e-3 --tune-seeds 0 --seeds 0 1 2"
    assert command.main(flags(path, more)) == 0
    ran = [(line["lr"], line["seed"]) for line in lines_of(path)]
    assert sorted(ran) == [(1e-5, 0), (1e-3, 0), (1e-3, 1), (1e-3, 2)]


def test_command_takes_options_for_all_or_one(path: Path) -> None:
    more = "--lrs 1e-3 --seeds 0 --task-option batch=8 --optimizer-option adamw:eps=1e-6"
    assert command.main(flags(path, more)) == 0
    (line,) = lines_of(path)
    assert line["task_options"] == {"batch": 8}
    assert line["optimizer_options"] == {"eps": 1e-6}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--task-option batch", "--task-option 'batch': must be NAME=VALUE"),
        ("--task-option lm:batch=4", "'lm' must be one of ['tabular']"),
        ("--task-option depth=4", "option 'depth' of task 'tabular'"),
        ("--optimizer-option gain=2", "option 'gain' of optimizer 'adamw'"),
    ],
)
def test_command_refuses_wrong_options(
    more: str, message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(flags(path, f"--lrs 1e-3 {more}")) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_command_without_a_file_or_anything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(path), "--output", str(path.parent)]) == 2
    assert "runs.jsonl: does not exist" in capsys.readouterr().err
    assert command.main([]) == 2
    commands = "run, report, pairs, never-worse, cost, again, --quick"
    assert f"give one of: {commands}" in capsys.readouterr().err


def test_recorded_runs_are_made_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was recorded otherwise is seen; runs of others are not made."""
    words = "--tasks digits-fullbatch --lrs 1e-2 --budgets 3 --seeds 0 1"
    assert command.main(flags(path, f"{words} --optimizers adamw lion")) == 0
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        line["final"] *= 2 - line["seed"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = path.parent / "again.jsonl"
    words = ["again", str(path), "--optimizers", "adamw", "--output", str(again)]
    assert command.main(words) == 0
    made = [json.loads(text) for text in again.read_text().splitlines()]
    assert {line["optimizer"] for line in made} == {"adamw"}
    assert {line["seed"] for line in made} == {0, 1}
    table = capsys.readouterr().out
    assert all(figure in table for figure in ("0.7071", "0.5000", "1.0000"))
    assert command.main([*words, "--seeds", "7"]) == 2
    assert "no recorded run" in capsys.readouterr().err


def test_cost_compares_optimizers_with_the_first(path: Path) -> None:
    words = "--tasks digits-fullbatch --optimizers adamw hybrid --gradients 3 --rounds 2"
    file = path.parent / "cost.json"
    assert command.main(["cost", *words.split(), "--output", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["adamw", "hybrid"]
    assert rows[0]["ratios"] == [1.0, 1.0]
    assert all(row["milliseconds"] > 0 and len(row["ratios"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("cost --tasks lm --optimizers adamw", False),
        ("pairs runs.jsonl --optimizer hybrid", False),
        ("again runs.jsonl --optimizers hybrid", False),
        ("run --tasks lm --optimizers adamw --budgets 1", False),
        ("report runs.jsonl", True),
        ("never-worse", True),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused(
    words: str, folder: bool, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.parent.mkdir()
    path.touch()
    wrong = path if folder else path.parent
    assert command.main([*words.split(), "--output", str(wrong)]) == 2
    wanted = "a folder, and is a file" if folder else "a file, and is a folder"
    assert f"--output {wrong}: must be {wanted}" in capsys.readouterr().err
