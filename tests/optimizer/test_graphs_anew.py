"""What a graph does not hold any more: captured anew, or refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_graphs import WAITS, FakeGraph, graphs_made
from torch import Tensor, nn
from training import run_of
from triton_hybrid.kernels import capture
from triton_hybrid.kernels.launch import Launch, start
from twins import Twins, captured, everything, on_host, same

from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer
from triton_hybrid.distributed import Ranks
from triton_hybrid.graphs import GraphedSteps

__all__ = ["graphs_made"]  # a fixture
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CPU tensors"),
    pytest.mark.filterwarnings("error"),
]


def test_gradients_that_moved_are_an_error_and_nothing_changes(
    graphs_made: list[FakeGraph],
) -> None:
    twins = Twins()
    captured(twins)
    before = everything(twins.models[1], twins.optimizer)
    before = {name: value.clone() for name, value in before.items()}
    host = on_host(twins.optimizer)
    twins.give()
    grads = [param.grad for param in twins.models[1].parameters()]
    for param in twins.models[1].parameters():
        param.grad = param.grad.clone()
    with pytest.raises(RuntimeError, match=r"other memory .*set_to_none=False.* reset\(\)"):
        twins.graphs.step()
    found = everything(twins.models[1], twins.optimizer)
    same(found, before)
    assert on_host(twins.optimizer) == host
    for param, grad in zip(twins.models[1].parameters(), grads):
        param.grad = grad
    for step, optimizer in zip(twins.steps, twins.optimizers):
        step()
        optimizer.zero_grad(set_to_none=False)
    twins.check()
    count = len(graphs_made)
    for param in twins.models[1].parameters():
        param.grad = param.grad.clone()
    twins.graphs.reset()
    twins.run(40)
    assert len(graphs_made) > count


def test_gradients_may_move_until_a_step_is_captured(graphs_made: list[FakeGraph]) -> None:
    """Their addresses are on the device before: a capture would refuse to upload them."""
    twins = Twins(predictor="none", full_steps=1, backend="triton")
    while not graphs_made:
        for param in twins.models[1].parameters():
            param.grad = torch.zeros_like(param)
        twins.step()
    twins.run(2)
    assert graphs_made[0].replays == 3


@pytest.mark.parametrize("change", ["no gradient", "frozen", "memory", "group"])
def test_what_is_bound_anew_is_captured_anew(change: str, graphs_made: list[FakeGraph]) -> None:
    twins = Twins()
    captured(twins)
    before = [graph.replays for graph in graphs_made]
    for model, optimizer in zip(twins.models, twins.optimizers):
        last = [*model.parameters()][-1]
        if change in ("no gradient", "frozen"):
            last.grad = None
            last.requires_grad_(change != "frozen")
            twins.without = {3}
        elif change == "memory":
            last.data = last.data.clone()
        else:
            model.register_parameter("more", nn.Parameter(torch.ones(3)))
            optimizer.add_param_group({"params": [model.more]})
    twins.run(40)
    assert [graph.replays for graph in graphs_made[: len(before)]] == before
    assert sum(graph.replays for graph in graphs_made) > sum(before) + 20


def test_a_step_without_gradients_is_none(graphs_made: list[FakeGraph]) -> None:
    twins = Twins()
    captured(twins)
    for model in twins.models:
        for param in model.parameters():
            param.grad = None
    steps = twins.optimizer.stats().steps
    for step in twins.steps:
        step()
    twins.check()
    assert twins.optimizer.stats().steps == steps


def test_a_capture_that_fails_leaves_the_step_to_be_made(
    graphs_made: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins, graph = Twins(accumulation=AccumulationConfig(2, minimum=2)), torch.cuda.graph
    failures = 0

    @contextlib.contextmanager
    def failing(*given: Any) -> Iterator[None]:
        with graph(*given):
            yield
        if not failures:
            raise torch.OutOfMemoryError("no room for a graph")

    def step() -> None:
        nonlocal failures
        before = on_host(twins.optimizer) if twins.number else None
        try:
            twins.graphs.step()
        except torch.OutOfMemoryError:
            failures += 1
            assert on_host(twins.optimizer) == before
            twins.graphs.step()

    monkeypatch.setattr(torch.cuda, "graph", failing)
    twins.steps[1] = step
    for _ in range(40):
        for _ in range(2):
            twins.give()
            assert twins.eager.window_complete == twins.optimizer.window_complete
        twins.step(noise=0.0)
    assert failures == 1
    assert sum(graph.replays for graph in graphs_made) > 20


def test_what_cannot_be_captured_is_refused_at_once(
    graphs_made: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    param = nn.Parameter(torch.ones(3))
    for options, error, message in (
        ({}, ValueError, "capturable=False: must be True"),
        ({"capturable": True, "hybrid": HybridConfig(offload="cpu")}, ValueError, "offload='cpu'"),
    ):
        with pytest.raises(error, match=message):
            GraphedSteps(HybridOptimizer([param], **options))
    with pytest.raises(TypeError, match="optimizer is a AdamW: must be a HybridOptimizer"):
        GraphedSteps(torch.optim.AdamW([param]))
    optimizer = HybridOptimizer([param], capturable=True)
    graphs = GraphedSteps(optimizer)
    monkeypatch.setattr(type(optimizer._binding.ranks), "together", True)
    with pytest.raises(NotImplementedError, match="several ranks is not built"):
        GraphedSteps(optimizer)
    with pytest.raises(NotImplementedError, match="several ranks is not built"):
        graphs.step()
    monkeypatch.undo()
    capture.CAPTURED_ON.discard("cpu")
    with pytest.raises(ValueError, match="parameters are on cpu: must be on a CUDA device"):
        GraphedSteps(optimizer)


def test_a_grad_scaler_is_refused(graphs_made: list[FakeGraph]) -> None:
    twins = Twins()
    captured(twins)
    twins.give()
    twins.optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match="a GradScaler drives the step"):
        twins.graphs.step()


def lone_capture(step: Callable[[], object]) -> None:
    with torch.cuda.graph(FakeGraph(), "the pool", None, "thread_local"):
        step()


REFUSED: dict[str, str] = {
    "not capturable": "capturable=False: must be True",
    "first step": "the optimizer has not stepped yet",
    "other memory": "the optimizer has not stepped yet, or its parameters",
    "state": "the optimizer has not stepped yet, or its parameters",
    "scaler": "a GradScaler drives the step",
    "rate": "a replay would bring learning rates",
    "moved gradients": "a replay would bring learning rates or addresses",
    "loss": r"loss=0\.5 is a number on the host",
    "who has gradients": "a replay would bring learning rates or addresses",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_capture_by_oneself_that_cannot_work_is_refused(
    case: str, graphs_made: list[FakeGraph]
) -> None:
    options = {"capturable": case != "not capturable", "predictor": "none"}
    options["backend"] = "triton" if "gradients" in case else "torch"
    model, optimizer = run_of("fp32", **options)
    params = [*model.parameters()]
    for param in params:
        param.grad = torch.ones_like(param)
    if case != "first step":
        for _ in range(3):
            optimizer.step()
    last = params[-1]
    if case == "other memory":
        last.data = last.data.clone()
    elif case == "state":
        optimizer.state[last]["exp_avg"] = optimizer.state[last]["exp_avg"].clone()
    elif case == "scaler":
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    elif case == "rate":
        optimizer.param_groups[0]["lr"] *= 0.5
    elif case in ("moved gradients", "who has gradients"):
        last.grad = torch.ones_like(last) if case == "moved gradients" else None
    before = {key: value.clone() for key, value in everything(model, optimizer).items()}
    told = (lambda: optimizer.observe_loss(0.5)) if case == "loss" else optimizer.step
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: {REFUSED[case]}"):
        lone_capture(told)
    same(everything(model, optimizer), before)
    if case not in ("not capturable", "first step"):
        optimizer.step()  # as if nothing had been


def test_a_capture_by_oneself_replays_the_base_rule(graphs_made: list[FakeGraph]) -> None:
    twins = Twins(predictor="none")
    twins.run(12)
    lone_capture(twins.optimizer.step)
    twins.optimizer._progress.controller.restore(twins.eager._progress.controller.state())
    twins.give(noise=0.0)
    twins.eager.step()
    graphs_made[-1].replay()
    pairs = [everything(*pair) for pair in zip(twins.models, twins.optimizers)]
    same(*pairs)


def test_exchange_through_the_host_is_refused(
    graphs_made: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, sums = Ranks(False), torch.ones(2, dtype=torch.float64)
    monkeypatch.setattr(Ranks, "together", True)
    reduced: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda values, group: reduced.append(values))
    for backend in ("cuda:nccl", "cuda:gloo"):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, backend=backend: backend)
        with torch.cuda.graph(FakeGraph(), "the pool", None, "thread_local"):
            if "gloo" in backend:
                with pytest.raises(RuntimeError, match="process_group with backend 'cuda:gloo'"):
                    ranks.reduce(sums)
            else:
                assert ranks.reduce(sums) is sums
    assert len(reduced) == 1


def test_a_kernel_that_the_driver_will_not_load_is_named(graphs_made: list[FakeGraph]) -> None:
    def again() -> None:
        raise RuntimeError("Triton Error [CUDA]: " + WAITS)

    launch, cpu = Launch(None, again), torch.device("cpu")
    with pytest.raises(RuntimeError, match="Triton Error"):
        start([launch], cpu)
    with (
        torch.cuda.graph(FakeGraph(), "the pool", None, "thread_local"),
        pytest.raises(RuntimeError, match="a step of this kind has not run yet"),
    ):
        start([launch], cpu)
