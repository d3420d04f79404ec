"""The average of the weights: how it is kept, where it pulls, and where it must not."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import Problem, assert_near, assert_same_bits, plain, set_entries
from test_kernels_adamw import BACKENDS as STEPS
from test_kernels_adamw import Step
from test_kernels_predict import BACKENDS as MOVES
from test_kernels_predict import Book, Move, sure
from training import fast_config, make_model, train
from triton_hybrid.kernels.hyper import HYPER
from triton_hybrid.kernels.ledger import INDEX, read_ledger
from triton_hybrid.kernels.observe import LEVEL_BETA, OUTLIER
from triton_hybrid.kernels.predict import LEVEL_AGE
from triton_hybrid.runtime import LEVEL_SHARE, Runtime

from triton_hybrid import HybridOptimizer

SHAPES = ((70,), (5, 7))
STEADY = {"lr": 1e-2, "weight_decay": 0.1, "horizon": 0.0}


@STEPS
def test_the_first_update_is_the_average_and_later_ones_are_averaged(
    device: torch.device, step: Step
) -> None:
    problem = Problem(plain(*SHAPES), device, groups=(STEADY,))
    step(problem)
    for index, weight in enumerate(problem.rows["weight"]):
        assert_near(problem.rows["weight_ema"][index], weight, f"average {index}")
    for count in (1, 100):
        set_entries(problem.ledger, slow_count=count)
        before = [average.clone() for average in problem.rows["weight_ema"]]
        step(problem)
        decay = min(count / (count + 2), LEVEL_BETA.value)
        for index, weight in enumerate(problem.rows["weight"]):
            expected = decay * before[index] + (1 - decay) * weight
            assert_near(problem.rows["weight_ema"][index], expected, f"average {index}", atol=1e-6)


@STEPS
def test_the_gradient_along_the_way_from_the_average_is_measured(
    device: torch.device, step: Step
) -> None:
    problem = Problem(plain(*SHAPES), device, groups=(STEADY,))
    rows = problem.rows
    slope = sum(
        float(g.double().flatten() @ (w - a).double().flatten())
        for g, w, a in zip(rows["grad"], rows["weight"], rows["weight_ema"])
    )
    set_entries(problem.ledger, slow_count=9, pull=3.0)
    step(problem)
    assert read_ledger(problem.ledger)["pull"] == pytest.approx(3.0 + 0.2 * (slope - 3.0), rel=1e-5)


@STEPS
def test_an_outlier_enters_the_slow_ema_at_twice_the_usual_norm(
    device: torch.device, step: Step
) -> None:
    problem = Problem(plain(*SHAPES), device, groups=(STEADY,))
    norm = float(torch.stack([g.double().norm() for g in problem.rows["grad"]]).norm())
    usual = norm / 50
    set_entries(problem.ledger, norm_count=30, norm_mean=torch.tensor(usual).log().item())
    set_entries(problem.ledger, slow_count=4)
    old = [s.clone() for s in problem.rows["slow_ema"]]
    step(problem)
    for index, gradient in enumerate(problem.rows["grad"]):
        expected = 0.5 * old[index] + 0.5 * (OUTLIER.value / 50) * gradient
        assert_near(problem.rows["slow_ema"][index], expected, f"slow EMA {index}", atol=1e-6)
    assert read_ledger(problem.ledger)["norm"] == pytest.approx(norm), "the judge sees all of it"


@STEPS
def test_without_level_the_average_keeps_every_bit(device: torch.device, step: Step) -> None:
    problem = Problem(plain(*SHAPES), device)
    before = [average.clone() for average in problem.rows["weight_ema"]]
    step(problem, level=False)
    for actual, expected in zip(problem.rows["weight_ema"], before):
        assert_same_bits(actual, expected, "average")


@MOVES
@pytest.mark.parametrize(
    ("pull", "count", "level", "share"),
    [
        (1.0, 10.0, True, 0.5),
        (1.0, 2 * LEVEL_AGE.value, True, 0.125),
        (-1.0, 10.0, True, 0.0),
        (0.0, 10.0, True, 0.0),
        (1.0, 10.0, False, 0.0),
    ],
)
def test_a_prediction_goes_part_of_the_way_to_the_average(
    device: torch.device,
    move: Move,
    book: Book,
    pull: float,
    count: float,
    level: bool,
    share: float,
) -> None:
    problem = sure(Problem(plain(*SHAPES), device, groups=(STEADY,)), horizon=1.0)
    set_entries(problem.ledger, pull=pull, slow_count=count)
    old = [weight.clone() for weight in problem.rows["weight"]]
    averages = [average.clone() for average in problem.rows["weight_ema"]]
    move(problem, level=level)
    for index, weight in enumerate(problem.rows["weight"]):
        expected = old[index] + share * (averages[index] - old[index])
        assert_near(weight, expected, f"weight {index}", atol=1e-6)
        assert_same_bits(problem.rows["weight_ema"][index], averages[index], "average")


def level_of(optimizer: HybridOptimizer) -> float:
    """The share of the way that the next predicted step would go, as the device has it."""
    runtime: Runtime = optimizer._runtime
    return float(runtime.hyper[0, HYPER["level"]])


@pytest.mark.parametrize("tensor", [False, True])
def test_only_a_constant_learning_rate_pulls(tensor: bool) -> None:
    model = make_model()
    lr = torch.tensor(1e-2) if tensor else 1e-2
    optimizer = HybridOptimizer(model.parameters(), lr=lr, hybrid=fast_config())
    train(model, optimizer, 3)
    assert level_of(optimizer) == LEVEL_SHARE
    optimizer.param_groups[0]["lr"] = lr * 0.9
    train(model, optimizer, 1)
    assert level_of(optimizer) == 0.0
    train(model, optimizer, 1)
    assert level_of(optimizer) == LEVEL_SHARE


def test_weights_written_from_outside_become_the_average() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 3)
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.fill_(0.25)
    optimizer._bind()
    assert torch.equal(optimizer.state[parameter]["weight_ema"], parameter)


def test_a_checkpoint_without_the_average_starts_it_at_the_weights() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry["weight_ema"]
    restored = HybridOptimizer(model.parameters(), hybrid=fast_config())
    restored.load_state_dict(saved)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    restored._bind()
    for parameter in model.parameters():
        assert torch.equal(restored.state[parameter]["weight_ema"], parameter)


@pytest.mark.parametrize("predictor", ["linear", "subspace", "none"])
def test_models_that_do_not_use_the_average_do_not_keep_it(predictor: str) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(predictor=predictor))
    train(model, optimizer, 3)
    assert not any("weight_ema" in entry for entry in optimizer.state.values())


def test_an_old_run_leaves_the_average_alone() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 420)
    before = [entry["weight_ema"].clone() for entry in optimizer.state.values()]
    assert optimizer.stats().gradient_evaluations >= 256
    train(model, optimizer, 8)
    for entry, expected in zip(optimizer.state.values(), before):
        assert torch.equal(entry["weight_ema"], expected)
    assert optimizer._runtime.ledger[INDEX["slow_count"]] > 256
