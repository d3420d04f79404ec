"""`GraphedSteps` against eager steps, bit for bit, with a stand-in for CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_graphs import WAITS, FakeGraph, graphs_made
from torch import Tensor
from training import run_of
from triton_hybrid.kernels.scalars import HYPER
from twins import Twins, captured, everything, same

from triton_hybrid import AccumulationConfig, HybridOptimizer, Phase

__all__ = ["graphs_made"]  # a fixture
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CPU tensors"),
    pytest.mark.filterwarnings("error"),
]


CASES: dict[str, dict[str, Any]] = {
    "none": {"predictor": "none"},
    "slow_ema": {"predictor": "slow_ema"},
    "auto": {"predictor": "auto"},
    "linear": {"predictor": "linear", "correction_interval": 2},
    "slow_ema, two in a row": {"predictor": "slow_ema", "correction_interval": 2},
    "secant": {"predictor": "secant"},
    "stretches of three": {"correction_interval": 3, "max_predict_steps": 7},
    "clipped": {"max_grad_norm": 0.5},
    "scaled": {"loss_scale": "dynamic"},
    "bf16": {"kind": "bf16"},
    "bf16 linear": {"kind": "bf16", "predictor": "linear"},
    "bf16 split": {"kind": "bf16 split"},
    "muon": {"kind": "muon"},
    "muon linear": {"kind": "muon", "predictor": "linear"},
    "lion": {"kind": "lion"},
    "triton": {"backend": "triton"},
}


@pytest.mark.parametrize(
    ("case", "inline"),
    [(case, inline) for case in CASES for inline in (True, False) if case != "triton" or inline],
)
def test_the_same_bits_as_eager_steps(
    case: str, inline: bool, graphs_made: list[FakeGraph]
) -> None:
    """With a schedule, gradients that are not finite, and a loss in two of three steps."""
    twins = Twins(**{"kind": "fp32", **CASES[case], "inline": inline})
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in twins.optimizers
    ]
    steps = 30 if case == "triton" else 130
    for number in range(steps):
        twins.step(bad=number % 37 == 29, observe=number % 3 > 0)
        if twins.optimizer.phase is not Phase.PREDICT:
            for scheduler in schedulers:
                scheduler.step()
    replays = [graph.replays for graph in graphs_made]
    assert sum(replays) >= max(steps - 30, 8)  # all but the first cycles
    assert len(graphs_made) <= (12 if "stretches" in case else 8)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])
@pytest.mark.parametrize(
    ("case", "launches_of_a_cycle"),
    [("none", 2), ("slow_ema", 3), ("linear", 3), ("secant", 1), ("stretches of three", 3)],
)
def test_a_kind_says_all_that_a_graph_bakes_in(
    case: str, launches_of_a_cycle: int, inline: bool, graphs_made: list[FakeGraph]
) -> None:
    """Every step is captured anew: steps of one kind must launch the same with the same numbers."""

    class Forgetful(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            return False

    twins = Twins(**CASES[case], inline=inline)
    twins.run(8)
    twins.graphs._graphs = Forgetful()
    known: dict[Any, list[str]] = {}
    for _ in range(60):
        before = len(graphs_made)
        kind = twins.graphs._kind(twins.optimizer._engine)
        if twins.number % 20 == 10:
            for optimizer in twins.optimizers:
                optimizer.param_groups[0]["lr"] *= 0.5
        twins.step()
        for graph in graphs_made[before:]:
            assert known.setdefault(kind, graph.described) == graph.described
    assert len(graphs_made) > 40
    launches = {tuple(its) for its in known.values()}
    # Beside them, those of the first stretch, and of the cycles before a trajectory is known.
    assert launches_of_a_cycle <= len(launches) <= len(known) <= launches_of_a_cycle + 5


def test_the_stand_in_bakes_in_what_a_graph_bakes_in(graphs_made: list[FakeGraph]) -> None:
    weight, rate, factor = torch.zeros(3), torch.ones(()), 1.0
    graph = FakeGraph()
    with torch.cuda.graph(graph, "the pool", None, "thread_local"):
        assert torch.cuda.is_current_stream_capturing()
        weight.add_(rate * factor)
        with pytest.raises(RuntimeError, match=WAITS):
            rate.item()
        with pytest.raises(RuntimeError, match=WAITS):
            weight.tolist()
    assert weight.tolist() == [0.0] * 3  # nothing was done yet
    rate.fill_(2.0)
    factor = 100.0
    graph.replay()
    graph.replay()
    assert weight.tolist() == [4.0] * 3
    assert not torch.cuda.is_current_stream_capturing()


def test_a_baked_in_rate_would_be_found(
    graphs_made: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins()
    twins.run(40)
    monkeypatch.setattr(twins.optimizer._engine, "refresh", lambda groups: None)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(AssertionError):
        twins.run(1)


def test_state_dict_in_the_middle_of_a_stretch_goes_on_bit_for_bit(
    graphs_made: list[FakeGraph],
) -> None:
    twins = Twins(inline=False, correction_interval=3, max_predict_steps=7)
    captured(twins, Phase.PREDICT)
    while not twins.optimizer._progress.controller.in_row:
        twins.step()
    assert twins.optimizer._progress.controller.in_row > 0
    saved = [
        (model.state_dict(), o.state_dict()) for model, o in zip(twins.models, twins.optimizers)
    ]
    other = Twins(inline=False, correction_interval=3, max_predict_steps=7)
    other.run(25)
    graphs = {graph for graph, _ in other.graphs._graphs.values()}
    assert graphs
    for model, optimizer, (weights, state) in zip(other.models, other.optimizers, saved):
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    other.generator.set_state(twins.generator.get_state())
    for _ in range(60):
        twins.step()
        other.step()
        pair = [everything(its.models[1], its.optimizer) for its in (twins, other)]
        same(*pair)
    again = {graph for graph, _ in other.graphs._graphs.values()}
    assert again  # captured again
    assert not graphs & again


def test_the_loop_of_the_page(graphs_made: list[FakeGraph]) -> None:
    (model, _), loader = run_of("fp32"), [torch.randn(8, 12) for _ in range(40)]
    # docs: begin loop
    from triton_hybrid.graphs import GraphedSteps

    optimizer = HybridOptimizer(model.parameters(), lr=1e-3, capturable=True)
    graphs = GraphedSteps(optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(loader))
    for batch in loader:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.observe_loss(loss)
        graphs.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay in their memory
    # docs: end
    assert 3 <= graphs.captured <= 4 < sum(graph.replays for graph in graphs_made)
    assert optimizer.stats().gradient_evaluations == len(loader)


class OnDevice(Tensor):
    """A tensor that says it is on a GPU, and cannot be read."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def __float__(self) -> float:
        raise RuntimeError(WAITS)


@pytest.mark.parametrize("predictor", ["none", "slow_ema", "linear"])
def test_rates_on_the_device_are_read_by_replays(
    predictor: str, graphs_made: list[FakeGraph]
) -> None:
    twins = Twins(predictor=predictor)
    twins.run(1)  # which may wait for the device
    rates = [torch.full((), 1e-2).as_subclass(OnDevice) for _ in range(2)]
    for optimizer, rate in zip(twins.optimizers, rates):
        optimizer.param_groups[0]["lr"] = rate
    for number in range(80):
        for rate in rates:
            rate.mul_(0.3 if number == 40 else 0.98)
        twins.step()
    for optimizer in twins.optimizers:
        assert optimizer._engine.rates_on_device
        assert float(optimizer._engine.scalars.hyperparameters[0, HYPER["lr"]]) < 1e-3
    assert sum(graph.replays for graph in graphs_made) > 50


def test_others_write_between_replays(graphs_made: list[FakeGraph]) -> None:
    """Weights, verified weights, rates of zero, a beta that forbids predictions."""
    twins = Twins(predictor="auto", inline=False, correction_interval=2)
    captured(twins, Phase.PREDICT)
    for number in range(120):
        for model, optimizer in zip(twins.models, twins.optimizers):
            weight = next(model.parameters())
            if number % 11 == 5:
                weight.data[0, 0] = 0.25
            if number % 7 == 3:
                with optimizer.verified_weights():
                    weight.square().sum()
            if number % 13 == 8:
                optimizer.eval()  # and no train()
            if number % 40 in (20, 25):
                optimizer.param_groups[0]["lr"] = 0.0 if number % 40 == 20 else 1e-2
            if number % 40 in (29, 36):
                betas = (0.4, 0.99) if number % 40 == 29 else (0.9, 0.999)
                optimizer.param_groups[0]["betas"] = betas
        twins.step()
    assert twins.optimizer.stats().rollbacks == twins.eager.stats().rollbacks
    assert sum(graph.replays for graph in graphs_made) > 60


@pytest.mark.parametrize("inline", [True, False])
def test_closures_and_hooks(inline: bool, graphs_made: list[FakeGraph]) -> None:
    twins = Twins(inline=inline)
    calls: list[list[str]] = [[], []]
    for optimizer, heard in zip(twins.optimizers, calls):
        optimizer.register_step_pre_hook(lambda *_, heard=heard: heard.append("before"))
        optimizer.register_step_post_hook(lambda *_, heard=heard: heard.append("after"))
    for _ in range(60):
        drawn: list[Tensor] = []

        def closure(place: int, drawn: list[Tensor] = drawn) -> Tensor:
            drawn.extend([] if drawn else twins.give())
            calls[place].append("closure")
            return drawn[place]

        needed = twins.eager.needs_backward
        returned = [
            step(lambda place=place: closure(place)) for place, step in enumerate(twins.steps)
        ]
        assert [loss is not None for loss in returned] == [needed] * 2
        for optimizer in twins.optimizers:
            optimizer.zero_grad(set_to_none=False)
        twins.check()
    assert calls[0] == calls[1]
    assert calls[0].count("before") == calls[0].count("after") == 60
    assert sum(graph.replays for graph in graphs_made) > 40


@pytest.mark.parametrize("predictor", ["none", "slow_ema"])
def test_windows(predictor: str, graphs_made: list[FakeGraph]) -> None:
    """Adaptive accumulation: lengths, rates and divisors change from step to step."""
    twins = Twins(predictor=predictor, accumulation=AccumulationConfig(4))
    lengths = set()
    for number in range(150):
        length = 0
        while not length or not all([o.window_complete for o in twins.optimizers]):
            losses = twins.give(noise=0.05 if number < 90 else 3.0)
            for optimizer, loss in zip(twins.optimizers, losses):
                optimizer.observe_loss(loss)
            length += 1
        lengths.add(length)
        twins.take()
    assert len(lengths) > 1
    assert sum(graph.replays for graph in graphs_made) > 120
    twins.give()
    with pytest.raises(RuntimeError, match="nobody asked window_complete"):
        twins.graphs.step()
