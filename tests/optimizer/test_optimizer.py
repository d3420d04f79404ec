"""What loops, trainers and torch itself do with an optimizer."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    masters_of,
    run_of,
    state_copy,
    train,
    until,
    weights,
)

import triton_hybrid
from triton_hybrid import HybridConfig, HybridOptimizer, Phase, needs_backward
from triton_hybrid.engine import Engine

BACKENDS = ["torch", "triton"]


def test_defaults_are_those_of_adamw() -> None:
    ours = HybridOptimizer([nn.Parameter(torch.zeros(2))]).defaults
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).defaults
    for name in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert ours[name] == theirs[name]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr=-1.0"),
    ({"lr": float("nan")}, ValueError, "lr=nan"),
    ({"lr": "fast"}, ValueError, "lr='fast'"),
    ({"lr": torch.ones(2)}, ValueError, "lr has shape"),
    ({"betas": (0.9,)}, ValueError, "betas="),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]=-0.1"),
    ({"eps": -1e-8}, ValueError, "eps=-1e-08"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay=inf"),
    ({"base": "sgd"}, ValueError, "base='sgd'"),
    ({"base": "muon"}, ValueError, r"base='muon' has shape \(2,\)"),
    ({"hybrid": {"full_steps": 3}}, ValueError, "hybrid="),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0"),
    ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm=nan"),
    ({"master_weights": "maybe"}, ValueError, "master_weights='maybe'"),
    ({"accumulation": 4}, ValueError, "accumulation=4: must be an AccumulationConfig"),
    ({"maximize": 1}, ValueError, "maximize=1"),
    ({"capturable": None}, ValueError, "capturable=None"),
    ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ({"process_group": "world"}, ValueError, "process_group='world'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_argument_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HybridOptimizer([nn.Parameter(torch.zeros(2))], **options)


BAD_PARAMS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (list, ValueError, "empty"),
    (lambda: [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], ValueError, "complex64"),
    (lambda: [nn.Parameter(torch.zeros(3).expand(2, 3))], ValueError, "share memory"),
    (lambda: [nn.Parameter(torch.eye(3).to_sparse())], ValueError, "layout"),
    (lambda: [{"params": [nn.Parameter(torch.zeros(2))], "lr": -3.0}], ValueError, "lr=-3.0"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS)
def test_bad_params_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HybridOptimizer(make())


def test_add_param_group_refuses_before_anything_is_changed() -> None:
    optimizer = HybridOptimizer([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="eps=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "eps": -1})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradient_is_refused_before_any_weight_is_touched() -> None:
    first, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = HybridOptimizer([first, *table.parameters()])
    (first.sum() + table(torch.tensor([1])).sum()).backward()
    before = weights(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same_weights(weights(optimizer), before)


def test_reshard_leaves_other_modules_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    triton_hybrid.reshard(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_observe_loss_refuses_several_elements() -> None:
    optimizer = HybridOptimizer([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="loss has shape"):
        optimizer.observe_loss(torch.zeros(3))


AGREE = {
    "fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "bf16 split": 1e-3, "bf16 alone": 1e-2,
    # A sign decided by the last bit would differ by twice the rate.
    "lion": 1e-5, "lion bf16": 1e-5, "muon": 2e-3, "muon bf16": 2e-2,
}  # fmt: skip
"""How far the weights of both backends may lie apart."""


@pytest.mark.parametrize(
    ("kind", "predictor"),
    [
        *itertools.product(("fp32", "fp16", "bf16"), ("slow_ema", "linear")),
        ("fp32", "auto"),
        *itertools.product(("bf16 split", "bf16 alone"), ("slow_ema", "linear")),
        *itertools.product(("lion", "lion bf16", "muon", "muon bf16"), ("slow_ema",)),
    ],
)
def test_both_backends_agree_in_every_phase(kind: str, predictor: str) -> None:
    runs = []
    for backend in BACKENDS:
        options = {"predictor": predictor, "inline": False, "history": 3}
        model, optimizer = run_of(kind, backend=backend, max_grad_norm=1.0, **options)
        path: list[Tensor] = []

        def note(step: int, phase: Phase, opt: Any = optimizer, path: Any = path) -> None:
            path.append(torch.cat([master.flatten().double() for master in masters_of(opt)]))

        phases = train(model, optimizer, 14, after=note)
        assert {Phase.PREDICT, Phase.CORRECT} <= set(phases)
        runs.append((phases, path))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1]):
        assert ((a - b).norm() / a.norm()).item() < AGREE[kind]


def test_float64_parameters() -> None:
    model = make_model(torch.float64)
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 8)
    entry = optimizer.state[next(model.parameters())]
    assert entry["exp_avg"].dtype == torch.float64
    assert "master" not in entry


def test_inline_consumes_one_gradient_a_call() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(correction_interval=2))
    phases = train(model, optimizer, 40)
    stats = optimizer.stats()
    assert Phase.PREDICT not in phases
    assert stats.gradient_evaluations == 40
    assert stats.predicted_steps > 10


def test_stepped_predict_ignores_gradients_and_closure() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(inline=False))
    until(optimizer, model, Phase.PREDICT)
    twin = copy.deepcopy(model)
    other = HybridOptimizer(twin.parameters(), hybrid=fast_config(inline=False))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer.needs_backward
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)

    def closure() -> Tensor:
        raise AssertionError("called")

    assert optimizer.step(closure) is None
    other.step()
    assert_same_weights(weights(optimizer), weights(other))


def test_closure_returns_its_loss_and_is_observed() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    batches = make_batches()

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = next(batches)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        loss = optimizer.step(closure)
        assert isinstance(loss, Tensor)
        assert loss.requires_grad
    assert optimizer._engine.read()["loss_previous"] == pytest.approx(loss.item())


def test_step_without_any_gradient_does_nothing() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters())
    optimizer.step()
    assert optimizer.stats().steps == 0
    train(model, optimizer, 2)
    before = weights(optimizer)
    optimizer.step()
    assert optimizer.stats().steps == 2
    assert_same_weights(weights(optimizer), before)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_go_on_alike(copier: str) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(inline=False), lr=1e-2)
    until(optimizer, model, Phase.PREDICT)
    both = (model, optimizer)
    twin, other = copy.deepcopy(both) if copier == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert other.hybrid == optimizer.hybrid
    assert train(model, optimizer, 12) == train(twin, other, 12)
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))


def test_a_checkpoint_of_adamw_is_taken_over() -> None:
    model = make_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, adamw, 5)
    twin = copy.deepcopy(model)
    optimizer = HybridOptimizer(twin.parameters(), hybrid=HybridConfig(predictor="none"))
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    batch = next(make_batches(9))
    for m, o in ((model, adamw), (twin, optimizer)):
        backward(m, batch)
        o.step()
    for a, b in zip(weights(adamw), weights(optimizer)):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_amsgrad_checkpoint_is_refused() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = HybridOptimizer([param])
    with pytest.raises(ValueError, match="amsgrad=True"):
        optimizer.load_state_dict(torch.optim.AdamW([param], amsgrad=True).state_dict())


def test_distributed_checkpointing_initialises_without_advancing() -> None:
    """DCP calls step() with zero gradients and lr 0, and wants every key of every parameter."""
    model = make_model(torch.bfloat16)
    optimizer = HybridOptimizer(model.parameters(), lr=0.0, hybrid=fast_config(predictor="auto"))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = weights(optimizer)
    optimizer.step()
    assert optimizer.stats().steps == 0
    assert_same_weights(weights(optimizer), before)
    for param in model.parameters():
        along = "direction" if param.ndim == 2 else "slow_ema"
        wanted = {"step", "exp_avg", "exp_avg_sq", "master", "move", "prediction", along}
        assert set(optimizer.state[param]) == wanted


def test_a_first_step_at_learning_rate_zero_still_counts() -> None:
    """A warm-up schedule starts at lr 0; its first gradient must reach the moments."""
    param = nn.Parameter(torch.ones(3))
    optimizer = HybridOptimizer([param], lr=0.0)
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.stats().steps == 1
    assert optimizer.state[param]["exp_avg"].norm() > 0


def test_parameters_replaced_in_the_groups() -> None:
    """accelerate puts other parameter objects into the groups after construction."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    new = make_model(seed=3)
    optimizer.param_groups[0]["params"] = list(new.parameters())
    before = weights(optimizer)
    train(new, optimizer, 8)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))


def test_parameter_unfrozen_and_group_added_in_mid_run() -> None:
    model = make_model()
    first, *rest = model.parameters()
    first.requires_grad_(False)
    optimizer = HybridOptimizer([first, rest[0]], hybrid=fast_config())
    train(model, optimizer, 6)
    assert first not in optimizer.state
    first.requires_grad_(True)
    optimizer.add_param_group({"params": rest[1:], "lr": 1e-2})
    steps = optimizer.state[rest[0]]["step"].item()
    before = weights(optimizer)
    train(model, optimizer, 6)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))
    assert optimizer.state[rest[0]]["step"].item() > steps
    assert 0 < optimizer.state[first]["step"].item() <= 6


def test_gradients_are_released() -> None:
    """zero_grad(set_to_none=True) must free them: nothing of ours may hold on."""
    import weakref

    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    backward(model, next(make_batches()))
    optimizer.step()
    storage = weakref.ref(next(model.parameters()).grad.untyped_storage())  # type: ignore[union-attr]
    grads = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)
    assert storage() is None


def test_cpu_parameters_beside_an_idle_gpu_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="the parameters are on the CPU") as record:
        optimizer = HybridOptimizer([nn.Parameter(torch.zeros(2))])
    assert [warning.filename for warning in record] == [__file__]
    assert optimizer.backend == "torch"


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_hybrid.kernels.launch.INTERPRETED", False)
    param = nn.Parameter(torch.zeros(2))
    optimizer = HybridOptimizer([param], backend="triton")
    assert optimizer.backend == "triton"
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        optimizer.step()
    assert param.detach().tolist() == [0.0, 0.0]


def test_needs_backward_looks_through_wrappers() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(inline=False))
    until(optimizer, model, Phase.PREDICT)
    assert needs_backward(Wrapper(Wrapper(optimizer))) is False
    assert needs_backward(torch.optim.SGD(model.parameters())) is True


def test_state_dict_holds_plain_values_only() -> None:
    """Distributed checkpointing flattens tensors, ints, floats, bools and dicts; nothing else."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 8)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                check(inner)
        else:
            assert isinstance(value, (Tensor, int, float, bool)), value

    state = optimizer.state_dict()
    check(state["state"])
    check(state["param_groups"][0]["hybrid_progress"])
    assert all(isinstance(v, Tensor) for e in state["state"].values() for v in e.values())


def test_stats_read_well() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    assert optimizer.stats().predicted_fraction == 0.0
    train(model, optimizer, 20)
    stats = optimizer.stats()
    text = str(stats)
    assert f"{stats.gradient_evaluations} gradient evaluations" in text
    assert stats.steps == stats.gradient_evaluations + stats.predicted_steps
    assert sum(stats.steps_per_phase.values()) == stats.steps
    assert stats.to_dict()["acceptance_rate"] == 1.0
    parameters = sum(p.numel() for p in model.parameters())
    assert stats.state_bytes_device >= 13 * parameters


@pytest.mark.parametrize("kind", ["lion", "lion bf16", "muon"])
@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "linear", "none"])
@pytest.mark.parametrize("inline", [True, False])
def test_every_rule_trains_in_every_phase(kind: str, predictor: str, inline: bool) -> None:
    model, optimizer = run_of(kind, predictor=predictor, inline=inline)
    batches = make_batches()
    first = float(backward(model, next(batches)))
    optimizer.zero_grad()
    train(model, optimizer, 120, batches)
    assert float(backward(model, next(batches))) < 0.5 * first
    stats = optimizer.stats()
    assert (stats.predicted_steps > 3) == (predictor != "none")
    if predictor in ("auto", "slow_ema"):
        assert stats.confidence > 0


@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "auto"])
def test_every_prediction_moves_the_weights(predictor: str) -> None:
    model, optimizer = run_of("fp32", predictor=predictor, inline=False)
    batches = make_batches()
    moved = 0
    for _ in range(60):
        before, phase, rollbacks = weights(optimizer), optimizer.phase, optimizer.stats().rollbacks
        train(model, optimizer, 1, batches)
        if phase is Phase.PREDICT and optimizer.stats().rollbacks == rollbacks:
            moved += 1
            for old, new in zip(before, weights(optimizer)):
                assert not torch.equal(old, new)
    assert moved >= 4


@pytest.mark.parametrize("stop", range(5, 12))
def test_stepped_checkpoint_goes_on_inline(stop: int) -> None:
    """Inline, every step needs a gradient, also the first after a stretch that was cut off."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config(inline=False))
    train(model, optimizer, stop)
    other = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config(inline=True))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    batches = make_batches(3)
    for _ in range(12):
        assert other.needs_backward
        train(model, other, 1, batches)
    assert other.stats().predicted_steps > optimizer.stats().predicted_steps


@pytest.mark.parametrize("bad", [(), (3,), (2, 4)])
def test_skips_that_nobody_saw_lengthen_the_full_phase(
    bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host looks once a cycle; until then a skipped step counts as one."""
    monkeypatch.setattr(Engine, "reads_are_free", False)
    model = make_model()
    config = fast_config(warmup_steps=1, full_steps=5, inline=False)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    steps = 0
    while optimizer.phase is not Phase.PREDICT:
        backward(model, next(make_batches(steps)))
        if steps in bad:
            next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    assert steps == 6 + len(bad)
