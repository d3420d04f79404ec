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
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
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


def random_gradient_run(make: Any, steps: int = 100, scheduled: bool = False) -> Tensor:
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_promise_1_predictor_none_is_adamw(name: str, backend: str) -> None:
    def ours(params: list[nn.Parameter]) -> HybridOptimizer:
        return HybridOptimizer(params, backend=backend, hybrid=NONE, **copy.deepcopy(OPTIONS[name]))

    expected = random_gradient_run(
        lambda params: torch.optim.AdamW(params, **copy.deepcopy(OPTIONS[name]))
    )
    assert ((random_gradient_run(ours) - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_1_predictor_none_is_adamw_with_groups_and_scheduler(backend: str) -> None:
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 1e-2, "weight_decay": 0.0},
            {"params": params[2:], "betas": (0.8, 0.99), "maximize": True},
        ]

    def ours(params: list[nn.Parameter]) -> HybridOptimizer:
        return HybridOptimizer(groups(params), backend=backend, hybrid=NONE)

    expected = random_gradient_run(lambda params: torch.optim.AdamW(groups(params)), scheduled=True)
    actual = random_gradient_run(ours, scheduled=True)
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("predictor", ["slow_ema", "secant", "linear"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_promise_2_parameter_is_the_rounded_master(
    dtype: torch.dtype, predictor: str, backend: str
) -> None:
    model = make_model(dtype)
    config = fast_config(predictor=predictor, inline=False)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, backend=backend, hybrid=config)
    seen = set()

    def check(step: int, phase: Phase) -> None:
        seen.add(phase)
        for param in model.parameters():
            master = optimizer.state[param]["master"]
            assert master.dtype == torch.float32
            point = master
            if predictor == "slow_ema" and optimizer._binding.progress.controller.stands:
                # The prediction stands in the parameter alone.
                point = weight_after(param, optimizer.state[param], RULES["adamw"].kernels)
            assert torch.equal(param.detach(), point.to(dtype)), f"{phase} at step {step}"
        with optimizer.verified_weights():
            for param in model.parameters():
                assert torch.equal(param.detach(), optimizer.state[param]["master"].to(dtype))

    train(model, optimizer, 30, after=check)
    assert seen == set(Phase)


def diverge(optimizer: HybridOptimizer, model: nn.Module, cause: str) -> None:
    """Takes a Correct step that must be rejected."""
    loss = backward(model, next(make_batches(3)))
    if cause == "norm":
        for param in model.parameters():
            assert param.grad is not None
            param.grad.mul_(1e4)
    optimizer.observe_loss(loss + 100 if cause == "loss" else loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cause", ["norm", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_promise_3_rollback_restores_bit_for_bit(
    dtype: torch.dtype, cause: str, backend: str
) -> None:
    model = make_model(dtype)
    config = fast_config(inline=False, correction_interval=3)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, backend=backend, hybrid=config)
    until(optimizer, model, Phase.PREDICT)
    before, state = weights(optimizer), state_copy(optimizer)
    train(model, optimizer, 3)
    assert optimizer.phase is Phase.CORRECT
    moved = weights(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, moved))
    diverge(optimizer, model, cause)
    assert_same_weights(weights(optimizer), before)
    assert_same_state(state_copy(optimizer), state, but=("residue", "move", "prediction"))
    assert optimizer.stats().divergences[cause] == 1
    assert optimizer.phase is Phase.FULL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=5)
@given(stop=st.integers(0, 25), predictor=st.sampled_from(["slow_ema", "secant", "linear"]))
def test_promise_4_state_dict_continues_bit_for_bit(
    stop: int, predictor: str, dtype: torch.dtype, backend: str
) -> None:
    config = fast_config(predictor=predictor, inline=False, correction_interval=2, history=3)
    options: dict[str, Any] = {"lr": 1e-2, "backend": backend, "hybrid": config}
    model = make_model(dtype)
    optimizer = HybridOptimizer(model.parameters(), **options)
    train(model, optimizer, stop, make_batches(1))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    other = HybridOptimizer(twin.parameters(), **options)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    phases = train(model, optimizer, 14, make_batches(2))
    assert train(twin, other, 14, make_batches(2)) == phases
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))


def test_promise_4_fp32_state_of_fp16_parameters_stays_fp32() -> None:
    model = make_model(torch.float16)
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    train(model, optimizer, 8)
    other = HybridOptimizer(copy.deepcopy(model).parameters(), hybrid=fast_config())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for entry in other.state.values():
        for key in ("exp_avg", "exp_avg_sq", "master", "slow_ema", "step"):
            assert entry[key].dtype == torch.float32, key
    assert_same_state(state_copy(optimizer), state_copy(other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("predictor", "value"),
    [("slow_ema", math.nan), ("slow_ema", math.inf), ("slow_ema", -math.inf), ("secant", math.nan)],
)
def test_promise_5_nonfinite_gradient_changes_nothing(
    predictor: str, value: float, inline: bool, backend: str
) -> None:
    """Before every gradient step of a whole run a poisoned step is tried."""
    model = make_model(torch.bfloat16)
    config = fast_config(predictor=predictor, inline=inline, correction_interval=2, history=3)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, backend=backend, hybrid=config)
    batches = make_batches(1)
    train(model, optimizer, 1, batches)
    asked = DEVICE.type == "cpu"
    for step in range(20):
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
    assert skipped >= 10


def test_promise_5_grad_scaler_skip_does_not_advance_the_phase() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    for step in range(12):
        x, y = next(make_batches(step))
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        overflow = step in (3, 7)
        if overflow:
            next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
        before, steps = optimizer.phase, optimizer.stats().steps
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            assert optimizer.phase is before
            assert optimizer.stats().steps == steps
    assert optimizer.stats().predicted_steps > 0


@pytest.mark.parametrize("predictor", ["slow_ema", "secant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_6_same_inputs_same_bits(backend: str, predictor: str) -> None:
    runs = []
    for _ in range(3):
        model = make_model(torch.bfloat16)
        optimizer = HybridOptimizer(
            model.parameters(), lr=1e-2, backend=backend, max_grad_norm=0.5,
            hybrid=fast_config(predictor=predictor, history=3),
        )  # fmt: skip
        train(model, optimizer, 15)
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


@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "secant", "linear", "none"])
def test_promise_8_memory_is_flat_after_the_first_step(predictor: str) -> None:
    model = make_model()
    config = fast_config(predictor=predictor, history=3)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-3, hybrid=config)
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
    train(model, optimizer, 1990, batches)
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
