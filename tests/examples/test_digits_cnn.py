"""The digits example: data, runs, and what is made of them."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import digits_cnn
from digits_cnn import parse_options
from lib import digits_data, digits_training
from lib.digits_report import Row, Tried, faster
from lib.digits_training import Contender, Point, Recipe, Run, train

pytestmark = pytest.mark.usefixtures("own_cache")
Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]

TINY = "--budget 6 --batch 8 --interval 3 --target 0.05 --tuning-seeds 7 --lrs 1e-3 2e-3 4e-3 8e-3"
NAMES = ["adamw", "conservative", "aggressive", "muon", "muon_hybrid", "control"]


@pytest.fixture(scope="module")
def digits() -> digits_data.Digits:
    return digits_data.load_digits(None)


def idx(magic: int, array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, dash: str = "-", suffix: str = "", training: int = 60) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", training), ("t10k", 20)):
        images = generator.integers(256, size=(count, 28, 28))
        for kind, content in (
            (f"images{dash}idx3", idx(0x0803, images)),
            (f"labels{dash}idx1", idx(0x0801, generator.integers(10, size=count))),
        ):
            path = folder / f"{name}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.booleans())
def test_idx_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], zipped: bool
) -> None:
    array = np.random.default_rng(1).integers(256, size=shape).astype(np.uint8)
    content = idx(0x0803, array)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert np.array_equal(digits_data.read_idx(path, 0x0803), array)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "magic number"),
        (b"\0\0", "magic number"),
        (idx(0x0801, np.zeros(3)), "magic number 0x00000801; allowed: 0x00000803"),
        (idx(0x0D03, np.zeros((1, 2, 2))), "magic number 0x00000d03; allowed: 0x00000803"),
        (idx(0x0803, np.zeros((1, 2, 2)))[:10], "10 bytes; allowed: at least the 16"),
        (idx(0x0803, np.zeros((1, 2, 2)))[:-1], "19 bytes; allowed: 20"),
        (idx(0x0803, np.zeros((1, 2, 2))) + b"\0", "21 bytes; allowed: 20"),
        (struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "16 bytes; allowed: "),
        (gzip.compress(idx(0x0803, np.zeros((9, 9, 9))), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "some-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-file: .*{named}"):
        digits_data.read_idx(path, 0x0803)


@pytest.mark.parametrize(("dash", "suffix"), [("-", ""), ("-", ".gz"), (".", ""), (".", ".gz")])
def test_mnist_is_read_under_its_usual_names(tmp_path: Path, dash: str, suffix: str) -> None:
    write_mnist(tmp_path, dash=dash, suffix=suffix)
    digits = digits_data.load_digits(tmp_path)
    assert [len(part) for part in (digits.training, digits.validation, digits.test)] == [50, 10, 20]
    assert digits.size == 28
    assert digits.digest() == digits_data.load_digits(tmp_path).digest()
    assert float(digits.training.tensors[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(digits.training.tensors[0].std()) == pytest.approx(1, abs=1e-5)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(0x0801, np.zeros(59)))
    with pytest.raises(ValueError, match="59 labels; allowed: 60"):
        digits_data.load_digits(tmp_path)
    labels.write_bytes(idx(0x0801, np.full(60, 10)))
    with pytest.raises(ValueError, match="label 10; allowed: 0 to 9"):
        digits_data.load_digits(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(0x0803, np.zeros((60, 8, 8))))
    with pytest.raises(ValueError, match=r"shape \(60, 8, 8\); allowed: \(images, 28, 28\)"):
        digits_data.load_digits(tmp_path)


def test_digits_are_split_once_and_for_all(digits: digits_data.Digits) -> None:
    parts = (digits.training, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1097, 300, 400]
    images = torch.cat([part.tensors[0] for part in parts]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert digits.digest() == digits_data.load_digits(None).digest()


@pytest.mark.parametrize("size", [8, 28])
def test_about_fifty_thousand_parameters(size: int) -> None:
    assert abs(digits_training.parameter_count(size) - 50_000) < 1_000
    output = digits_training.build_model(size)(torch.zeros(3, 1, size, size))
    assert output.shape == (3, 10)


@given(
    seed=st.integers(0, 2**63 - 1),
    examples=st.integers(1, 40),
    batch=st.integers(1, 40),
    gradients=st.integers(1, 12),
)
def test_batches_depend_on_the_seed_alone(
    seed: int, examples: int, batch: int, gradients: int
) -> None:
    order = digits_training.batch_order(seed, examples, batch, gradients)
    # A shorter run, such as the control's, sees the same batches as far as it goes.
    longer = digits_training.batch_order(seed, examples, batch, gradients + 3)
    assert order.shape == (gradients, batch)
    assert torch.equal(order, longer[:gradients])
    for whole in order.flatten().split(examples):
        assert len(whole.unique()) == len(whole)


def test_runs_of_a_seed_are_paired(digits: digits_data.Digits, monkeypatch: Patch) -> None:
    seen: list[torch.Tensor] = []
    original = torch.nn.functional.cross_entropy

    def cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels.clone())
        if len(seen) % 10 == 1:
            first_outputs.append(output.detach().clone())
        return original(output, labels)

    first_outputs: list[torch.Tensor] = []
    monkeypatch.setattr(digits_training.functional, "cross_entropy", cross_entropy)
    recipe = Recipe(budget=10, batch=16, interval=5, target=0.9, schedule="linear")
    contenders = (digits_cnn.ADAMW, *digits_cnn.HYBRIDS, *digits_cnn.MUONS)
    for contender in contenders:
        train(contender, recipe, digits, digits.test, seed=4, learning_rate=1e-3)
    labels = torch.stack(seen).reshape(len(contenders), 10, 16)
    assert torch.equal(labels, labels[:1].expand_as(labels))
    assert all(torch.equal(output, first_outputs[0]) for output in first_outputs)


def test_without_prediction_it_is_adamw(digits: digits_data.Digits) -> None:
    recipe = Recipe(budget=12, batch=16, interval=2, target=0.9, schedule="linear")
    still = Contender("still", "", "", digits_cnn.HybridConfig(predictor="none"))
    first, second = (
        train(one, recipe, digits, digits.test, seed=1, learning_rate=4e-3)
        for one in (digits_cnn.ADAMW, still)
    )
    assert [p.accuracy for p in first.curve] == [p.accuracy for p in second.curve]
    assert (first.predicted_steps, second.predicted_steps) == (None, 0)


def test_presets_predict_within_a_run(digits: digits_data.Digits) -> None:
    recipe = Recipe(budget=40, batch=16, interval=2, target=0.9, schedule="linear")
    curves: dict[str, list[float]] = {}
    for contender in (digits_cnn.ADAMW, *digits_cnn.HYBRIDS):
        run = train(contender, recipe, digits, digits.test, seed=1, learning_rate=4e-3)
        curves[contender.name] = [point.accuracy for point in run.curve]
        if contender.hybrid is not None:
            assert contender.hybrid.inline
            assert run.predicted_steps
            assert run.stats is not None
            assert run.stats["gradient_evaluations"] == 40
    # A predicted step that moves nothing would be counted all the same.
    assert curves["aggressive"] != curves["adamw"]


def made_run(*accuracies: float, seed: int = 0) -> Run:
    curve = [Point(5 * (i + 1), a, i + 1.0, i + 1.0) for i, a in enumerate(accuracies)]
    return Run(seed, 1e-3, 5 * len(accuracies), curve)


def test_target_is_reached_at_the_first_measurement_there() -> None:
    point = made_run(0.5, 0.97, 0.9, 0.99).reached(0.97)
    assert point is not None
    assert point.gradients == 10
    assert made_run(0.5, 0.96).reached(0.97) is None


def test_ratios_are_paired_and_a_miss_is_no_number() -> None:
    baseline, other = (Row(Contender(name, name, "k")) for name in "ab")
    baseline.runs = {0: made_run(0.1, 0.9), 1: made_run(0.1, 0.1, 0.1, 0.9)}
    other.runs = {0: made_run(0.9, 0.9), 1: made_run(0.1, 0.9, 0.9, 0.9)}
    ratio = other.ratio(baseline, 0.9, "gradients")
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert faster([baseline, other], 0.9) is other
    other.runs[1] = made_run(0.1, 0.1)
    assert other.ratio(baseline, 0.9, "gradients") is None
    assert other.to_target(0.9, "seconds") is None
    assert faster([other, baseline], 0.9) is baseline


def test_tuning_prefers_the_target_then_accuracy() -> None:
    row = Row(Contender("a", "a", "k"))
    row.tried = [
        Tried(1e-3, (10, None), (0.99, 0.96), 20),
        Tried(2e-3, (12, 14), (0.98, 0.98), 20),
        Tried(4e-3, (14, 12), (0.99, 0.98), 20),
        Tried(8e-3, (None, None), (0.1, 0.1), 20),
    ]
    assert row.best.learning_rate == 4e-3
    assert not row.at_edge
    assert row.tried[0].cost[0] == 25


def test_from_start_to_end(tmp_path: Path, capsys: Capture) -> None:
    flags = [*TINY.split(), "--seeds", "0", "1", "--output", str(tmp_path / "out")]
    assert digits_cnn.main(flags) == 0
    shown = capsys.readouterr().out
    for text in ("Hybrid,", "no prediction", "as many", "every 3 gradients"):
        assert text in shown
    content: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert content["complete"]
    assert content["parameters"] == 49_788
    assert content["hardware"]
    assert content["versions"]["torch"]
    assert content["options"]["tuning_seeds"] == [7]
    assert list(content["optimizers"]) == NAMES
    for name, row in content["optimizers"].items():
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert len(row["tuning"]) == 4
        rates = {run["learning_rate"] for run in row["runs"]}
        assert rates == {row["learning_rate"]}
        assert (row["hybrid"] is None) == (name in ("adamw", "control"))
    hybrids = [content["optimizers"][name] for name in ("conservative", "aggressive")]
    needed = [row["evaluations_to_target"] for row in hybrids]
    reached = min(needed, key=lambda found: sum(6 if n is None else n for n in found))
    assert [run["budget"] for run in content["optimizers"]["control"]["runs"]] == reached
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(content)


def test_mnist_from_start_to_end(tmp_path: Path, capsys: Capture) -> None:
    write_mnist(tmp_path / "mnist")
    flags = [*TINY.split(), "--seeds", "0", "--data", str(tmp_path / "mnist"), "--schedule"]
    assert digits_cnn.main([*flags, "constant", "--output", str(tmp_path)]) == 0
    assert "MNIST, 28 x 28: 50 training" in capsys.readouterr().out


def test_interruption_leaves_what_was_done(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def stopping(contender: Contender, *arguments: Any, **keywords: Any) -> Run:
        if keywords["seed"] == 0 and contender.name == "aggressive":
            raise KeyboardInterrupt
        return train(contender, *arguments, **keywords)

    monkeypatch.setattr(digits_cnn, "train", stopping)
    flags = [*TINY.split(), "--seeds", "0", "--output", str(tmp_path)]
    assert digits_cnn.main(flags) == 130
    content = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert not content["complete"]
    assert len(content["optimizers"]["conservative"]["runs"]) == 1
    assert not content["optimizers"]["aggressive"]["runs"]
    assert "Interrupted" in capsys.readouterr().out


def test_defaults_suit_the_data() -> None:
    digits, mnist = parse_options([]), parse_options(["--data", "folder"])
    assert (digits.target, mnist.target) == (0.97, 0.99)
    assert (digits.budget, mnist.budget) == (200, 2_000)
    assert parse_options(["--data=folder", "--target", "0.5"]).target == 0.5
    assert len(digits.lrs) >= digits_cnn.FEWEST_RATES <= len(mnist.lrs)
