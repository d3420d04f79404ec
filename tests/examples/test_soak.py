"""The soak run: it passes where nothing grows, and says what grew where something does."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from soak import command, measure
from soak.leg import HYBRID, ROUND, Leg, SoakRunner, run_leg
from soak.measure import NOISE_FACTOR, RESIDENT_FLOOR, ResidentGrowth, Sample, Watch
from triton_hybrid import HybridOptimizer, offload

SETTLED = 50  # later than the last allocation, and sooner than in a whole run
RESULTS = Path(command.__file__).resolve().parents[1] / "results"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    for module in (command, measure):
        monkeypatch.setattr(module, "SETTLED", SETTLED)
    monkeypatch.setattr(offload, "COPY_ON_CPU", False)
    yield
    torch.set_num_threads(threads)


def flags(output: Path, more: str = "") -> list[str]:
    tiny = "--steps 150 --predictors slow_ema --device cpu --backend torch --no-control"
    return [*tiny.split(), "--output", str(output), *more.split()]


def run(
    output: Path, more: str, after_step: Callable[[SoakRunner], None] | None = None
) -> tuple[int, dict[str, Any]]:
    status = command.main(flags(output, more), after_step)
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return status, content


def sample(step: int, leg_step: int, tensors: int = 10, **more: Any) -> Sample:
    values: dict[str, Any] = {
        "leg": "linear", "drive": "inline", "phase": "full", "tensor_bytes": 100,
        "device_bytes": 100, "state_bytes": 50, "resident_bytes": 0,
    }  # fmt: skip
    return Sample(step=step, leg_step=leg_step, tensors=tensors, **{**values, **more})


def test_a_short_run_goes_through_everything_and_nothing_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With state that is copied to the host and back."""
    copied = []
    copy = offload.Offload._copy

    def counted(self: offload.Offload, rows: Any, to_device: bool) -> None:
        copied.append(to_device)
        copy(self, rows, to_device)

    monkeypatch.setattr(offload.Offload, "_copy", counted)
    output = tmp_path / "folder" / "soak.json"
    status, content = run(output, "--steps 300 --predictors slow_ema linear --offload cpu")
    assert min(copied.count(True), copied.count(False)) > 100
    assert all(leg["stats"]["state_bytes_host"] > 0 for leg in content["legs"])
    assert content["found"] == []
    assert status == 0
    assert "0 quantities grew" in capsys.readouterr().out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [leg["leg"] for leg in content["legs"]] == ["slow_ema", "linear"]
    counts = Counter(thing for leg in content["legs"] for thing in leg["counts"])
    trips = {phase for leg in content["legs"] for phase in leg["round_trips_by_phase"]}
    assert all(leg["stats"]["rollbacks"] > 0 for leg in content["legs"])
    assert {
        "infinite loss", "huge gradient", "non-finite gradient", "no gradient at all",
        "zeroed in place", "other memory order", "matrix None", "norm and embedding None",
        "phase warmup", "phase full", "phase predict", "phase correct",
    } <= set(counts)  # fmt: skip
    assert {"full", "correct"} <= trips
    assert {sample["drive"] for sample in content["samples"]} == {"inline", "stepped"}
    assert len(content["samples"]) == 300 // ROUND
    assert all(leg["counts"]["predictions that moved the weights"] for leg in content["legs"])
    assert content["options"]["seed"] == 0
    assert content["versions"]["torch"]
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def of_each_cycle_and_leg(runner: SoakRunner, steps: int) -> dict[int, Any]:
    kept = {steps: torch.zeros(3, 5)} if runner.phase == "correct" else {}
    return kept | ({-1: runner.optimizer} if runner.leg.predictor == "linear" else {})


def once_and_late(runner: SoakRunner, steps: int) -> dict[int, Any]:
    return {steps: torch.zeros(1)} if steps == 110 else {}


def no_tensor(runner: SoakRunner, steps: int) -> dict[int, Any]:
    return {steps: bytes(b"\1" * 2**16)}


@pytest.mark.parametrize(
    ("leak", "more", "parts"),
    [
        (of_each_cycle_and_leg, "--steps 300 --predictors slow_ema linear",
         ["tensors grew by", "tensor_bytes grew by", "float32 [3, 5] on cpu", "left behind grew",
          "after linear"]),
        (once_and_late, "--drive inline", ["tensors grew by 1 "]),
        (no_tensor, "", ["resident memory grew by", "allowed: 1.00 MiB"]),
    ],
)  # fmt: skip
def test_what_is_kept_is_found(
    leak: Callable[[SoakRunner, int], dict[int, Any]],
    more: str,
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept: dict[int, Any] = {}

    def after_step(runner: SoakRunner) -> None:
        kept.update(leak(runner, runner.report.counts["steps"]))

    status, content = run(tmp_path / "soak.json", more, after_step)
    assert status == 1
    assert kept
    found = "\n".join(content["found"])
    assert all(part in found for part in parts)
    assert leak is not no_tensor or len(content["found"]) == 1
    assert "FAILED: " in capsys.readouterr().out


def test_what_the_optimizer_does_wrong_is_found() -> None:
    leg = Leg(HYBRID, "slow_ema", ("stepped",), 3 * ROUND, 0, 0, CPU, "torch")

    def spoil(runner: SoakRunner) -> None:
        if runner.report.counts["steps"] == 2 * ROUND:
            with torch.no_grad():
                runner.model.head.weight.add_(1.0)
                runner.model.norm.weight[0] = torch.nan

    report = run_leg(leg, lambda taken, kinds: None, spoil)
    assert any("head.weight is not its master, rounded" in text for text in report.wrong)
    assert any("norm.weight is not finite" in text for text in report.wrong)


@pytest.mark.parametrize("drives", [("stepped",), ("inline",)])
def test_predictions_that_move_nothing_are_found(
    drives: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    leg = Leg(HYBRID, "slow_ema", drives, 2 * ROUND, 0, 0, CPU, "torch")
    step, stats = HybridOptimizer.step, HybridOptimizer.stats

    def stand_still(self: HybridOptimizer, *closure: Any) -> Any:
        predicts = not self.needs_backward
        params = [param for group in self.param_groups for param in group["params"]]
        before = [param.detach().clone() for param in params]
        loss = step(self, *closure)
        for param, value in zip(params, before):
            param.data.copy_(value if predicts else param.data)
        return loss

    monkeypatch.setattr(HybridOptimizer, "step", stand_still)
    monkeypatch.setattr(
        HybridOptimizer, "stats", lambda self: dataclasses.replace(stats(self), horizon=0.0)
    )
    report = run_leg(leg, lambda taken, kinds: None, lambda runner: None)
    assert any("stats().horizon is 0.0, should be above 0" in text for text in report.wrong)
    assert any("no prediction moved" in text for text in report.wrong) == (drives == ("stepped",))


def test_only_equal_points_are_compared() -> None:
    watch = Watch()
    kinds = Counter({((2, 2), "torch.float32", "cpu"): 1})
    watch.add(sample(25, 25), kinds)
    watch.add(sample(100, SETTLED, 20), kinds)
    watch.add(sample(125, 125, 30, phase="correct"), kinds)
    watch.add(sample(150, 150, 20), kinds)
    watch.add(sample(175, 175, 19), kinds)
    assert watch.growths == []
    assert watch.points == {"linear inline correct": 1, "linear inline full": 3}
    more = kinds + Counter({((7,), "torch.int64", "cpu"): 1})
    watch.add(sample(200, 200, 21), more)
    watch.add(sample(225, 225, 22), more + more)
    watch.add(sample(230, 230, phase="predict"), kinds)
    watch.add(sample(235, 235, phase="predict", state_bytes=51), kinds)
    growth, of_state = watch.growths  # the largest share first
    assert (of_state.quantity, of_state.before, of_state.after) == ("state_bytes", 50, 51)
    assert (growth.before, growth.after, growth.last_step) == (20, 22, 225)
    assert "2 x int64 [7] on cpu" in str(growth)


def test_allowance_is_what_the_control_explains() -> None:
    assert measure.allowance(None) == RESIDENT_FLOOR
    assert measure.allowance(ResidentGrowth(10, 20)) == RESIDENT_FLOOR
    noise = 5 * RESIDENT_FLOOR
    assert measure.allowance(ResidentGrowth(10, noise)) == NOISE_FACTOR * noise
    assert measure.allowance(ResidentGrowth(-noise, 0)) == NOISE_FACTOR * noise
    samples = [sample(step, step, resident_bytes=3 * step) for step in range(0, 350, 50)]
    assert measure.resident_growth(samples) == ResidentGrowth(3 * 250, 3 * 250)
    assert measure.resident_growth([]) == ResidentGrowth(0, 0)


def test_storages_are_counted_once_and_gradients_too() -> None:
    whole = torch.zeros(4, 4)
    assert measure.storage_bytes([whole, whole[0], whole.t()]) == 64
    before = len(measure.live_tensors())
    param = torch.nn.Parameter(torch.zeros(3))
    (param * 2).sum().backward()
    assert len(measure.live_tensors()) == before + 2


def test_the_control_is_a_process_of_its_own(tmp_path: Path) -> None:
    given = flags(tmp_path / "soak.json", "--drive stepped")
    options = command.parse_options(given)
    with command.in_own_process(options) as wait:
        samples = wait()
    assert {sample.leg for sample in samples} == {"AdamW"}
    assert len(samples) == options.steps // ROUND
    assert all(sample.resident_bytes > 0 for sample in samples)


def test_every_leg_must_have_something_to_compare(tmp_path: Path, refusal: Any) -> None:
    message = "argument --steps: 149 is not possible; allowed: whole numbers from 150"
    given = flags(tmp_path / "soak.json", "--steps 149")
    assert message in refusal(lambda: command.parse_options(given))


@pytest.mark.parametrize("kind", ["none", "cpu"])
def test_the_file_in_the_repository_is_a_whole_run_without_growth(kind: str) -> None:
    name = "soak_cpu.json" if kind == "none" else "soak_offload_cpu.json"
    content = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert content["options"]["offload"] == kind
    assert content["options"]["steps"] == 10_000
    assert content["found"] == []
    assert content["resident"]["growth_bytes"] <= content["resident"]["allowed_growth_bytes"]
    assert content["resident"]["control_spread_bytes"] is not None
    assert {leg["leg"] for leg in content["legs"]} >= set(command.PREDICTORS)
