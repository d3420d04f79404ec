"""The soak run: it passes where nothing grows, and says what grew where something does."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("tokenizers")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

import soak
import soak_measure
from soak_measure import (
    NOISE_FACTOR,
    RESIDENT_FLOOR,
    ResidentGrowth,
    Sample,
    Watch,
    allowance,
    live_tensors,
    resident_growth,
    storage_bytes,
)
from soak_run import HYBRID, ROUND, Leg, SoakRunner, run_leg
from triton_hybrid.kernels.ledger import INDEX

from triton_hybrid import HybridOptimizer, offload

SETTLED = 50  # later than the last allocation, and sooner than in a whole run
RESULTS = Path(soak.__file__).resolve().parent / "results"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    for module in (soak, soak_measure):
        monkeypatch.setattr(module, "SETTLED", SETTLED)
    monkeypatch.setattr(offload, "COPY_ON_CPU", False)
    yield
    torch.set_num_threads(threads)


def flags(output: Path, *more: str) -> list[str]:
    tiny = "--steps 150 --predictors slow_ema --device cpu --backend torch --no-control"
    return [*tiny.split(), "--output", str(output), *more]


def run(
    output: Path, *more: str, after_step: Callable[[SoakRunner], None] | None = None
) -> tuple[int, dict[str, Any]]:
    status = soak.main(flags(output, *more), after_step)
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return status, content


def sample(step: int, leg_step: int, tensors: int = 10, **more: Any) -> Sample:
    values: dict[str, Any] = {
        "leg": "linear", "drive": "inline", "phase": "full", "tensor_bytes": 100,
        "device_bytes": 100, "state_bytes": 50, "resident_bytes": 0,
    }  # fmt: skip
    return Sample(step=step, leg_step=leg_step, tensors=tensors, **{**values, **more})


def test_a_short_run_goes_through_everything_and_nothing_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "folder" / "soak.json"
    status, content = run(output, "--steps", "300", "--predictors", "slow_ema", "linear")
    assert content["found"] == []
    assert status == 0
    assert "0 quantities grew" in capsys.readouterr().out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [leg["leg"] for leg in content["legs"]] == ["slow_ema", "linear"]
    counts: Counter[str] = Counter()
    trips: Counter[str] = Counter()
    for leg in content["legs"]:
        counts.update(leg["counts"])
        trips.update(leg["round_trips_by_phase"])
        assert leg["stats"]["rollbacks"] > 0
    happened = (
        "infinite loss", "huge gradient", "non-finite gradient", "no gradient at all",
        "zeroed in place", "other memory order", "matrix None", "norm and embedding None",
        "phase warmup", "phase full", "phase predict", "phase correct",
    )  # fmt: skip
    assert all(counts[thing] for thing in happened)
    assert {"full", "correct"} <= set(trips)
    assert {sample["drive"] for sample in content["samples"]} == {"inline", "stepped"}
    assert len(content["samples"]) == 300 // ROUND
    assert all(leg["counts"]["predictions that moved the weights"] for leg in content["legs"])
    assert content["options"]["seed"] == 0
    assert content["versions"]["torch"]
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_a_tensor_kept_each_cycle_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[torch.Tensor] = []

    def leak(runner: SoakRunner) -> None:
        if runner.phase == "correct":
            kept.append(torch.zeros(3, 5))

    status, content = run(tmp_path / "soak.json", after_step=leak)
    assert status == 1
    assert kept
    found = "\n".join(content["found"])
    assert "tensors grew by" in found
    assert "tensor_bytes grew by" in found
    assert "x float32 [3, 5] on cpu" in found
    assert "FAILED: " in capsys.readouterr().out


def test_a_single_element_kept_late_is_found(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []

    def leak(runner: SoakRunner) -> None:
        if runner.report.counts["steps"] == 110:
            kept.append(torch.zeros(1))

    status, content = run(tmp_path / "soak.json", "--drive", "inline", after_step=leak)
    assert status == 1
    assert any("tensors grew by 1 " in text for text in content["found"])


def test_state_is_what_the_optimizer_reports() -> None:
    leg = Leg(HYBRID, "slow_ema", ("inline",), ROUND, 0, 0, torch.device("cpu"), "torch")
    runner = SoakRunner(leg)
    for _ in range(3):
        runner.step()
    before, _ = runner.sample(3, 3)
    runner.optimizer.state[runner.model.norm.bias]["more"] = torch.zeros(25)
    after, _ = runner.sample(3, 3)
    assert after.state_bytes == before.state_bytes + 100
    assert after.tensors == before.tensors + 1


def test_memory_that_is_no_tensor_is_found(tmp_path: Path) -> None:
    kept: list[bytes] = []

    def leak(runner: SoakRunner) -> None:
        kept.append(bytes(b"\1" * 2**16))

    status, content = run(tmp_path / "soak.json", after_step=leak)
    assert status == 1
    (found,) = content["found"]
    assert "resident memory grew by" in found
    assert "allowed: 1.00 MiB" in found


def test_an_optimizer_that_outlives_its_leg_is_found(tmp_path: Path) -> None:
    kept: dict[int, torch.optim.Optimizer] = {}

    def leak(runner: SoakRunner) -> None:
        if runner.leg.predictor == "linear":
            kept[0] = runner.optimizer

    status, content = run(
        tmp_path / "soak.json", "--steps", "300", "--predictors", "slow_ema", "linear",
        after_step=leak,
    )  # fmt: skip
    assert status == 1
    assert any("left behind grew" in text and "after linear" in text for text in content["found"])


def test_what_the_optimizer_does_wrong_is_found() -> None:
    leg = Leg(HYBRID, "slow_ema", ("stepped",), 3 * ROUND, 0, 0, torch.device("cpu"), "torch")

    def spoil(runner: SoakRunner) -> None:
        if runner.report.counts["steps"] == 2 * ROUND:
            with torch.no_grad():
                runner.model.head.weight.add_(1.0)
                runner.model.norm.weight[0] = torch.nan

    report = run_leg(leg, lambda taken, kinds: None, spoil)
    assert any("head.weight is not its master, rounded" in text for text in report.wrong)
    assert any("norm.weight is not finite" in text for text in report.wrong)


@pytest.mark.parametrize("drives", [("stepped",), ("inline",)])
def test_predictions_that_move_nothing_are_found(drives: tuple[str, ...]) -> None:
    leg = Leg(HYBRID, "slow_ema", drives, 2 * ROUND, 0, 0, torch.device("cpu"), "torch")

    def stand_still(runner: SoakRunner) -> None:
        optimizer = runner.optimizer
        if isinstance(optimizer, HybridOptimizer) and optimizer._runtime_or_none is not None:
            optimizer._runtime.ledger[INDEX["horizon"]] = 0.0

    report = run_leg(leg, lambda taken, kinds: None, stand_still)
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
    assert allowance(None) == RESIDENT_FLOOR
    assert allowance(ResidentGrowth(10, 20)) == RESIDENT_FLOOR
    noise = 5 * RESIDENT_FLOOR
    assert allowance(ResidentGrowth(10, noise)) == NOISE_FACTOR * noise
    assert allowance(ResidentGrowth(-noise, 0)) == NOISE_FACTOR * noise
    samples = [sample(step, step, resident_bytes=3 * step) for step in range(0, 350, 50)]
    assert resident_growth(samples) == ResidentGrowth(3 * 250, 3 * 250)
    assert resident_growth([]) == ResidentGrowth(0, 0)


def test_storages_are_counted_once_and_gradients_too() -> None:
    whole = torch.zeros(4, 4)
    assert storage_bytes([whole, whole[0], whole.t()]) == 64
    before = len(live_tensors())
    param = torch.nn.Parameter(torch.zeros(3))
    (param * 2).sum().backward()
    assert len(live_tensors()) == before + 2


def test_the_control_is_a_process_of_its_own(tmp_path: Path) -> None:
    flags_of_control = flags(tmp_path / "soak.json", "--steps", "200", "--drive", "stepped")
    options = soak.parse_options(flags_of_control)
    control = soak.Control(options)
    try:
        samples = control.samples()
    finally:
        control.stop()
    assert {sample.leg for sample in samples} == {"AdamW"}
    assert len(samples) == options.steps // ROUND
    assert all(sample.resident_bytes > 0 for sample in samples)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "149"), "argument --steps: 149 is not possible; allowed: whole numbers from"),
        (("--predictors", "linear", "linear"), "argument --predictors:"),
        (("--output", "."), "argument --output: . is a folder; allowed: a file"),
    ],
)
def test_bad_flags(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.parse_options(flags(tmp_path / "soak.json", *more))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_offloaded_state_is_copied_and_nothing_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    copy = offload.Offload._copy

    def counted(self: offload.Offload, rows: Any, to_device: bool) -> None:
        copied.append(to_device)
        copy(self, rows, to_device)

    monkeypatch.setattr(offload.Offload, "_copy", counted)
    status, content = run(
        tmp_path / "soak.json", "--steps", "300", "--predictors", "linear", "auto",
        "--offload", "cpu",
    )  # fmt: skip
    assert content["found"] == []
    assert status == 0
    assert min(copied.count(True), copied.count(False)) > 100
    assert all(leg["stats"]["state_bytes_host"] > 0 for leg in content["legs"])


@pytest.mark.parametrize("kind", ["none", "cpu"])
def test_the_file_in_the_repository_is_a_whole_run_without_growth(kind: str) -> None:
    name = "soak_cpu.json" if kind == "none" else "soak_offload_cpu.json"
    content = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert content["options"]["offload"] == kind
    assert content["options"]["steps"] == 10_000
    assert content["found"] == []
    assert content["resident"]["growth_bytes"] <= content["resident"]["allowed_growth_bytes"]
    assert content["resident"]["control_spread_bytes"] is not None
    assert [leg["leg"] for leg in content["legs"]] == list(soak.PREDICTORS)
