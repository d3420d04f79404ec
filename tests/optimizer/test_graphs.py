"""`GraphedSteps` against eager steps, bit for bit, with a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_graphs import WAITS, FakeGraph, graphs_made
from kernel_memory import assert_same_bits
from torch import Tensor, nn
from training import run_of
from triton_hybrid.kernels import capture
from triton_hybrid.kernels.launch import Launch, start
from triton_hybrid.kernels.scalars import HYPER

from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer, Phase
from triton_hybrid.distributed import Ranks
from triton_hybrid.graphs import GraphedSteps

__all__ = ["graphs_made"]  # a fixture
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for CPU tensors"),
    pytest.mark.filterwarnings("error"),
]


class Twins:
    """Two alike, one of which steps eagerly and the other from graphs, on gradients of their own.

    Each gradient is of its own weights, so that whatever differs once differs for good.
    """

    def __init__(self, kind: str = "fp32", **options: Any) -> None:
        pairs = [run_of(kind, capturable=True, **options) for _ in range(2)]
        self.models, self.optimizers = zip(*pairs)
        self.eager, self.optimizer = self.optimizers
        self.graphs = GraphedSteps(self.optimizer)
        # Schedulers put a function of their own before the step.
        self.steps = [lambda *told: self.eager.step(*told), self.graphs.step]
        self.generator = torch.Generator().manual_seed(5)
        self.number = 0
        self.without: set[int] = set()
        """Parameters that get no gradient."""

    def give(self, noise: float = 0.3, bad: bool = False) -> list[Tensor]:
        """Gradients of a bowl with noise into both models' gradients, in place; their losses."""
        params = [[*model.parameters()] for model in self.models]
        losses = [torch.zeros(()) for _ in self.models]
        for index, pair in enumerate(zip(*params)):
            if index in self.without:
                continue
            drawn = noise * torch.randn(pair[0].shape, generator=self.generator)
            for place, param in enumerate(pair):
                weight = param.detach().float()
                gradient = (weight + drawn).to(param.dtype)
                if bad:
                    gradient.view(-1)[0] = math.nan
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                param.grad.add_(gradient)
                losses[place] += (weight + drawn).square().sum() / 2
        return losses

    def step(self, **given: Any) -> None:
        """One step of each; both must be the same afterwards, on the host too."""
        if self.eager.needs_backward:
            observe = given.pop("observe", True)
            for optimizer, loss in zip(self.optimizers, self.give(**given)):
                if observe:
                    optimizer.observe_loss(loss)
        self.take()

    def take(self) -> None:
        """One step of each with the gradients that are there."""
        for step, optimizer in zip(self.steps, self.optimizers):
            step()
            optimizer.zero_grad(set_to_none=False)
        self.number += 1
        self.check()

    def check(self) -> None:
        bits = [everything(*pair) for pair in zip(self.models, self.optimizers)]
        same(bits[1], bits[0], f"in step {self.number}")
        for optimizer in self.optimizers:  # zero_grad must free what a loop lets go of
            for its in optimizer._engine._sets:
                assert not any(grad.numel() for grad in its.flat.get("grad", ()))
        hosts = [on_host(optimizer) for optimizer in self.optimizers]
        assert hosts[1] == hosts[0], self.number

    def run(self, steps: int, **given: Any) -> None:
        for _ in range(steps):
            self.step(**given)


def everything(model: nn.Module, optimizer: HybridOptimizer) -> dict[str, Tensor]:
    """Weights, state and ledger."""
    found = {f"weight {name}": param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        entry = optimizer.state[param]
        found |= {f"{key} {name}": value for key, value in entry.items()}
    if optimizer._engine is not None:
        found["ledger"] = optimizer._engine.scalars.ledger
        found["rates"] = optimizer._engine.scalars.hyperparameters
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, f"{name} {what}")


def on_host(optimizer: HybridOptimizer) -> dict[str, Any]:
    """All that the host knows of the phases, but for seconds."""
    engine, progress = optimizer._engine, optimizer._progress
    plain = {
        f"{type(its).__name__}.{name}": value
        for its in (progress.controller, engine, engine.choice, engine.predictor)
        for name, value in vars(its).items()
        if isinstance(value, (bool, int, float, str, Phase))
    }
    windows = optimizer._binding.windows
    report = {} if windows is None else windows.report()
    stats = optimizer.stats().to_dict()
    del stats["seconds_per_phase"]
    return {**plain, **report, **{k: repr(v) for k, v in stats.items()}}


CASES: dict[str, dict[str, Any]] = {
    "none": {"predictor": "none"},
    "slow_ema": {"predictor": "slow_ema"},
    "auto": {"predictor": "auto"},
    "linear": {"predictor": "linear", "correction_interval": 2},
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


def captured(twins: Twins, kind: Phase = Phase.CORRECT) -> None:
    """Runs until every kind of step is replayed, and one of a phase comes next."""
    twins.run(30)
    while twins.optimizer.phase is not kind:
        twins.step()


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
