"""The nine promises of the optimizer, each with a test named after it."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import (
    KINDS,
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    run_of,
    state_copy,
    train,
    until,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase
from triton_hybrid.engine import Engine
from triton_hybrid.rules import RULES
from triton_hybrid.standing import weight_after

BACKENDS = ["torch", "triton"]
NONE = HybridConfig(predictor="none")


def random_gradient_run(make: Any, steps: int, scheduled: bool = False) -> Tensor:
    torch.manual_seed(0)
    shapes = ((30, 17), (9,), (2, 3, 4, 5), ())
    params = [nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in shapes]
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps) if scheduled else None
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for index, param in enumerate(params):
            if index == 1 and step % 3 == 0:
                param.grad = None
            else:
                drawn = torch.randn(param.shape, generator=generator) * 0.1
                param.grad = drawn.to(DEVICE)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([param.detach().flatten() for param in params]).double()


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.3, "lr": 1e-2},
    "betas": {"betas": (0.6, 0.95), "eps": 1e-6},
    "zero_betas": {"betas": (0.0, 0.5)},
    "tensor_lr": {"lr": torch.tensor(3e-3)},
}


def with_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": 1e-2, "weight_decay": 0.0},
        {"params": params[2:], "betas": (0.8, 0.99), "maximize": True},
    ]


@pytest.mark.parametrize(("backend", "steps"), [("torch", 100), ("triton", 25)])
@pytest.mark.parametrize("name", [*OPTIONS, "groups and scheduler"])
def test_promise_1_predictor_none_is_adamw(name: str, backend: str, steps: int) -> None:
    grouped = name not in OPTIONS
    runs = []
    for kind, own in (
        (HybridOptimizer, {"backend": backend, "hybrid": NONE}),
        (torch.optim.AdamW, {}),
    ):

        def make(params: Any, kind: Any = kind, own: Any = own) -> Any:
            options = copy.deepcopy(OPTIONS.get(name, {}))
            return kind(with_groups(params) if grouped else params, **own, **options)

        runs.append(random_gradient_run(make, steps, scheduled=grouped))
    assert ((runs[0] - runs[1]).norm() / runs[1].norm()).item() < 1e-6


HALVES = [
    *itertools.product(("fp16", "bf16"), ("slow_ema", "secant", "linear"), ("torch",)),
    *(("bf16", "slow_ema", "triton"), ("fp16", "linear", "triton")),
    *itertools.product(("lion bf16", "muon fp16", "muon bf16"), ("slow_ema",), ("torch",)),
]


@pytest.mark.parametrize(("kind", "predictor", "backend"), HALVES)
def test_promise_2_parameter_is_the_rounded_master(kind: str, predictor: str, backend: str) -> None:
    model, optimizer = run_of(kind, predictor=predictor, backend=backend, inline=False)
    seen = set()

    def assert_rounded(where: str, moved: bool) -> None:
        for group in optimizer.param_groups:
            rule = RULES[group["base"]].kernels
            for param in group["params"]:
                point = optimizer.state[param]["master"]
                assert point.dtype == torch.float32
                if moved and rule.along is not None:
                    # The prediction stands in the parameter alone.
                    point = weight_after(param, optimizer.state[param], rule)
                assert torch.equal(param.detach(), point.to(param.dtype)), where

    def check(step: int, phase: Phase) -> None:
        seen.add(phase)
        stands = optimizer._binding.progress.controller.stands
        assert_rounded(f"{phase} at step {step}", predictor == "slow_ema" and stands)
        with optimizer.verified_weights():
            assert_rounded(f"verified, {phase} at step {step}", False)

    train(model, optimizer, 30 if backend == "torch" else 16, after=check)
    assert seen == set(Phase)


LOSSES = {"loss": 1e6, "infinite": math.inf, "nan": math.nan}


def diverge(optimizer: HybridOptimizer, model: nn.Module, cause: str) -> None:
    """Takes a Correct step that must be rejected."""
    loss: Any = backward(model, next(make_batches(3)))
    if cause == "norm":
        for param in model.parameters():
            assert param.grad is not None
            param.grad.mul_(1e4)
    optimizer.observe_loss(LOSSES.get(cause, loss))
    optimizer.step()
    optimizer.zero_grad()


ALONE = ("bf16 alone", "fp16 alone")
OTHERS = ("bf16 split", "lion", "lion bf16", "muon", "muon bf16")
REJECTED = [
    *itertools.product(("fp32", "bf16"), ("slow_ema",), ("norm", *LOSSES), ("torch",)),
    *itertools.product(("bf16",), ("slow_ema",), ("norm", "nan"), ("triton",)),
    *itertools.product((*ALONE, *OTHERS), ("slow_ema", "linear"), ("infinite",), ("torch",)),
    *itertools.product(("bf16", *ALONE), ("secant",), ("infinite",), ("torch",)),
]


@pytest.mark.parametrize(("kind", "predictor", "cause", "backend"), REJECTED)
def test_promise_3_rollback_restores_bit_for_bit(
    kind: str, predictor: str, cause: str, backend: str
) -> None:
    interval = {"predictor": predictor, "inline": False, "correction_interval": 3}
    model, optimizer = run_of(kind, backend=backend, **interval)
    until(optimizer, model, Phase.PREDICT)
    before, state = weights(optimizer), state_copy(optimizer)
    while optimizer.phase is Phase.PREDICT:
        train(model, optimizer, 1)
    moved = weights(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, moved))
    while optimizer.phase is Phase.CORRECT:  # `secant` tries shorter moves before
        diverge(optimizer, model, cause)
    assert_same_weights(weights(optimizer), before)
    if predictor != "secant":  # which keeps what it has learnt of the move
        working = ("residue", "direction", "move", "prediction")
        assert_same_state(state_copy(optimizer), state, but=working)
    stats = optimizer.stats()
    assert stats.rollbacks == 1
    assert stats.divergences["norm" if cause == "norm" else "loss"] == 1
    assert optimizer.phase is Phase.FULL


def assert_resumes(kind: str, stop: int, more: int = 14, **options: Any) -> None:
    """Another process goes on from a checkpoint as this one does."""
    model, optimizer = run_of(kind, correction_interval=2, history=3, **options)
    train(model, optimizer, stop, make_batches(1))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin, other = run_of(kind, correction_interval=2, history=3, **options)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    phases = train(model, optimizer, more, make_batches(2))
    assert train(twin, other, more, make_batches(2)) == phases
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(
    stop=st.integers(0, 25),
    predictor=st.sampled_from(("auto", "slow_ema", "secant", "linear")),
    inline=st.booleans(),
)
def test_promise_4_state_dict_continues_bit_for_bit(
    stop: int, predictor: str, inline: bool, kind: str
) -> None:
    """In the middle of a stretch, too."""
    assume(predictor != "secant" or not kind.startswith(("lion", "muon")))
    assert_resumes(kind, stop, predictor=predictor, inline=inline)


@pytest.mark.parametrize(
    ("kind", "stop", "predictor"), [("fp16", 6, "slow_ema"), ("fp32", 9, "linear")]
)
def test_promise_4_in_the_kernels(kind: str, stop: int, predictor: str) -> None:
    assert_resumes(kind, stop, 7, predictor=predictor, inline=False, backend="triton")


POISONED = [
    *itertools.product(("bf16",), ("slow_ema",), (math.nan, math.inf, -math.inf), ("torch",)),
    *itertools.product(("bf16",), ("slow_ema", "secant"), (math.nan,), ("triton",)),
    ("bf16", "secant", math.nan, "torch"),
    *itertools.product(("muon", "lion"), ("slow_ema",), (math.nan, math.inf), ("torch",)),
]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(("kind", "predictor", "value", "backend"), POISONED)
def test_promise_5_nonfinite_gradient_changes_nothing(
    kind: str, predictor: str, value: float, backend: str, inline: bool
) -> None:
    """Before every gradient step of a whole run a poisoned step is tried."""
    options = {"predictor": predictor, "inline": inline, "correction_interval": 2, "history": 3}
    model, optimizer = run_of(kind, backend=backend, **options)
    config = optimizer.hybrid
    batches = make_batches(1)
    train(model, optimizer, 1, batches)
    asked = DEVICE.type == "cpu"
    steps = 20 if backend == "torch" else 9
    for step in range(steps):
        if optimizer.needs_backward:
            before, state, phase = weights(optimizer), state_copy(optimizer), optimizer.phase
            backward(model, next(make_batches(step)))
            last = list(model.parameters())[step % 4]
            assert last.grad is not None
            last.grad.flatten()[-1] = value
            optimizer.step()
            optimizer.zero_grad()
            assert_same_weights(weights(optimizer), before)
            assert_same_state(state_copy(optimizer), state)
            # On a GPU a step does not wait to see whether it was skipped (promise 7): the phase is
            # made as much longer when the device is asked, at its end.
            if asked or phase is Phase.CORRECT:
                assert optimizer.phase is phase
            elif phase is Phase.FULL and optimizer.phase is not phase:
                taken = optimizer.stats().gradient_evaluations - optimizer.stats().skipped_nonfinite
                assert taken >= config.warmup_steps + config.full_steps
            skipped = optimizer.stats().skipped_nonfinite
        train(model, optimizer, 1, batches)
    assert skipped >= steps // 2


@pytest.mark.parametrize(
    ("kind", "predictor", "backend"),
    [
        *itertools.product(("bf16",), ("slow_ema", "secant"), ("torch",)),
        ("bf16", "slow_ema", "triton"),
        ("muon", "auto", "torch"),
    ],
)
def test_promise_6_same_inputs_same_bits(kind: str, predictor: str, backend: str) -> None:
    runs = []
    for _ in range(3 if backend == "torch" else 2):
        options = {"predictor": predictor, "history": 3, "backend": backend}
        model, optimizer = run_of(kind, max_grad_norm=0.5, **options)
        train(model, optimizer, 15 if backend == "torch" else 10)
        runs.append((weights(optimizer), state_copy(optimizer)))
    for other in runs[1:]:
        assert_same_weights(runs[0][0], other[0])
        assert_same_state(runs[0][1], other[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation exists on a GPU only")
def test_promise_7_no_host_synchronisation_on_the_gpu() -> None:
    model = make_model()
    optimizer = HybridOptimizer(
        model.parameters(), hybrid=fast_config(inline=False), capturable=True
    )
    train_on = [next(make_batches(i)) for i in range(30)]
    for step, batch in enumerate(train_on):
        if optimizer.needs_backward:
            optimizer.observe_loss(backward(model, batch))
        if step > 2:
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


@pytest.mark.parametrize("capturable", [False, True])
def test_promise_7_the_ledger_is_read_at_most_once_a_cycle(
    monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    """The ledger is the only thing that the host reads; here the CPU plays a GPU."""
    model = make_model()
    config = fast_config(inline=False, correction_interval=2)
    optimizer = HybridOptimizer(model.parameters(), hybrid=config, capturable=capturable)
    train(model, optimizer, 1)
    reads = 0
    ask = optimizer._ask

    def counted(engine: Engine) -> Any:
        nonlocal reads
        reads += 1
        return ask(engine)

    monkeypatch.setattr(optimizer, "_ask", counted)
    monkeypatch.setattr(Engine, "reads_are_free", property(lambda self: False), raising=True)
    phases = train(model, optimizer, 60)
    rows = sum(a is not Phase.PREDICT and b is Phase.PREDICT for a, b in itertools.pairwise(phases))
    assert rows > 10
    assert reads <= (0 if capturable else rows + 1)


@pytest.mark.parametrize(
    ("kind", "predictor"),
    [*itertools.product(("fp32",), ("auto", "slow_ema", "secant", "linear", "none")),
     ("muon", "slow_ema"), ("lion", "linear")],
)  # fmt: skip
def test_promise_8_memory_is_flat_after_the_first_step(kind: str, predictor: str) -> None:
    model, optimizer = run_of(kind, predictor=predictor, history=3, lr=1e-3)
    batches = make_batches()

    def measure() -> tuple[int, int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
        stats = optimizer.stats()
        return stats.state_bytes_device, stats.state_bytes_host, len(tensors)

    train(model, optimizer, 1, batches)
    first = optimizer.stats().state_bytes_device
    train(model, optimizer, 9, batches)
    early = measure()
    train(model, optimizer, 240, batches)
    late = measure()
    assert early[0] == first
    assert late == early


def test_promise_9_unpredictable_training_is_left_to_adamw() -> None:
    """Gradients without any signal: predictions switch off, and AdamW's path is kept."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4000).to(DEVICE))
    config = HybridConfig(warmup_steps=5, predictor="slow_ema", confidence_threshold=0.9)
    optimizer = HybridOptimizer([param], lr=1e-3, hybrid=config)
    twin = nn.Parameter(param.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        twin.grad = param.grad.clone()
        optimizer.step()
        adamw.step()
    assert optimizer.stats().predicted_steps == 0
    assert ((param - twin).norm() / twin.norm()).item() < 1e-6


def test_promise_9_every_rejection_doubles_the_full_phase() -> None:
    model = make_model()
    optimizer = HybridOptimizer(
        model.parameters(), lr=1e-3, hybrid=fast_config(inline=False, full_steps=8)
    )
    batches = make_batches()
    waits = []
    for _ in range(4):
        wait = 0
        while optimizer.phase is not Phase.CORRECT:
            wait += optimizer.phase is not Phase.PREDICT
            train(model, optimizer, 1, batches)
        waits.append(wait)
        diverge(optimizer, model, "loss")
    assert waits[1:] == [2, 4, 8]
