"""``auto``: what it takes where training is deterministic, where not, and where that changes."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import assert_same_state, assert_same_weights, state_copy, weights
from triton_hybrid.kernels.trapezoid import WATCH

from triton_hybrid import HybridConfig, HybridOptimizer, Phase
from triton_hybrid.reference import Reference
from triton_hybrid.state import Batch, StateRow

SHORT = {"warmup_steps": 10, "full_steps": 3, "history": 4, "confidence_threshold": 0.0}


class Task:
    """A net on few points: all of them in every loss, or some, or through dropout."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(96, 6, generator=generator).to(DEVICE, dtype)
        self.y = torch.sin(self.x @ torch.randn(6, 3, generator=generator).to(DEVICE, dtype))
        torch.manual_seed(1)
        self.drop = nn.Dropout(0.0)
        self.model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), self.drop, nn.Linear(24, 3))
        self.model.to(DEVICE, dtype)
        self.batch, self.generator = 96, generator

    def loss(self) -> Tensor:
        chosen = torch.randperm(96, generator=self.generator)[: self.batch].sort().values
        found: Tensor = (self.model(self.x[chosen]) - self.y[chosen]).square().mean()
        return found

    def measured(self) -> float:
        """The loss of all points, without dropout."""
        with torch.no_grad():
            self.drop.eval()
            loss = (self.model(self.x) - self.y).square().mean().item()
            self.drop.train()
        return float(loss)

    def optimizer(self, *, lr: float = 1e-2, **options: Any) -> HybridOptimizer:
        changes = {key: options.pop(key) for key in [*options] if hasattr(HybridConfig(), key)}
        hybrid = HybridConfig(**{**SHORT, **changes})
        return HybridOptimizer(self.model.parameters(), lr=lr, hybrid=hybrid, **options)


def run(
    task: Task, optimizer: Any, steps: int, observe: bool = True, until: Any = lambda: False
) -> None:
    """Trains for so many steps, or until something is so."""
    for _ in range(steps):
        if until():
            return
        if getattr(optimizer, "needs_backward", True):
            optimizer.zero_grad()
            loss = task.loss()
            loss.backward()
            if observe and isinstance(optimizer, HybridOptimizer):
                optimizer.observe_loss(loss.detach())
        optimizer.step()


def takes(optimizer: HybridOptimizer, name: str) -> Callable[[], bool]:
    return lambda: optimizer.stats().predictor == name


def test_deterministic_training_ends_far_below_adamw() -> None:
    task, other = Task(), Task()
    optimizer = task.optimizer()
    run(task, optimizer, 120)
    run(other, torch.optim.AdamW(other.model.parameters(), lr=1e-2), 120)
    stats = optimizer.stats()
    assert (stats.predictor, stats.deterministic) == ("secant", True)
    assert "trapezoid" in stats.reason
    assert stats.reason in str(stats)
    assert stats.to_dict()["deterministic"] is True
    assert task.measured() < 0.3 * other.measured()


@pytest.mark.parametrize("noise", ["batch", "dropout"])
def test_noisy_training_is_that_of_slow_ema_bit_for_bit(noise: str) -> None:
    ends = []
    for predictor in ("auto", "slow_ema"):
        task = Task()
        task.batch, task.drop.p = (16, 0.0) if noise == "batch" else (96, 0.2)
        optimizer = task.optimizer(predictor=predictor)
        torch.manual_seed(5)
        run(task, optimizer, 120)
        ends.append((weights(optimizer), state_copy(optimizer)))
        stats = optimizer.stats()
        assert stats.predictor == "slow_ema"
        assert stats.deterministic is (False if predictor == "auto" else None)
        assert stats.predicted_steps > 20
    assert_same_weights(ends[0][0], ends[1][0])
    assert_same_state(ends[0][1], ends[1][1])


@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant", "none"])
def test_a_move_of_secant_under_another_predictor(predictor: str) -> None:
    """It is judged by who keeps a snapshot too; else it is taken out, and nothing is blamed."""
    task = Task()
    optimizer = task.optimizer(inline=False)
    run(task, optimizer, 90, until=takes(optimizer, "secant"))
    run(task, optimizer, 20, until=lambda: optimizer.phase is Phase.CORRECT)
    moved = weights(optimizer)
    with optimizer.verified_weights():
        verified = weights(optimizer)
    other = task.optimizer(predictor=predictor, inline=False)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other._binding.bind(other.param_groups, other.state)
    judged = predictor in ("linear", "secant")
    assert_same_weights(weights(other), moved if judged else verified)
    before = task.measured()
    run(task, other, 40)
    assert task.measured() < before
    assert all(bool(row.isfinite().all()) for entry in state_copy(other) for row in entry.values())


@pytest.mark.parametrize("noise", ["batch", "dropout"])
def test_noise_that_begins_later_brings_slow_ema_back_without_harm(noise: str) -> None:
    task, other = Task(), Task()
    optimizer = task.optimizer()
    adamw = torch.optim.AdamW(other.model.parameters(), lr=1e-2)
    for its, who in ((task, optimizer), (other, adamw)):
        run(its, who, 40)
        its.batch, its.drop.p = (16, 0.0) if noise == "batch" else (96, 0.1)
        torch.manual_seed(2)
    assert optimizer.stats().predictor == "secant"
    run(task, optimizer, 60, until=takes(optimizer, "slow_ema"))
    assert optimizer.stats().predictor == "slow_ema", "within sixty gradients"
    assert optimizer.stats().horizon == 1.0
    assert optimizer.stats().deterministic is False
    kept = {name for entry in optimizer.state.values() for name in entry}
    assert not {"move_0", "change_3", "last_gradient"} & kept, "its memory is given back"
    run(task, optimizer, 60)
    run(other, adamw, 100)
    assert optimizer.stats().deterministic is False
    assert optimizer.stats().predictor == "slow_ema"
    assert task.measured() < 1.1 * other.measured()


def test_noise_that_ends_later_brings_secant() -> None:
    task = Task()
    optimizer = task.optimizer()
    task.batch = 24
    run(task, optimizer, 60)
    assert optimizer.stats().deterministic is False
    task.batch, before = 96, task.measured()
    run(task, optimizer, 300, until=takes(optimizer, "secant"))
    run(task, optimizer, 60)
    assert optimizer.stats().predictor == "secant"
    assert task.measured() < 0.1 * before


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no loss", "no loss was observed"),
        ("muon", "base='adamw' alone"),
        ("capturable", "capturable=True"),
        ("beta1", "beta1 of 0.5"),
        ("few", "of the 8 steps"),
    ],
)
def test_where_it_stays_with_slow_ema_it_says_why(case: str, reason: str) -> None:
    task = Task()
    options: dict[str, Any] = {"capturable": True} if case == "capturable" else {}
    optimizer = task.optimizer(**options)
    if case == "muon":
        matrix, *rest = [p for p in task.model.parameters() if p.dim() == 2]
        rest += [p for p in task.model.parameters() if p.dim() != 2]
        groups = [{"params": [matrix], "base": "muon"}, {"params": rest}]
        optimizer = HybridOptimizer(groups, lr=1e-2, hybrid=HybridConfig(**SHORT))
    if case == "beta1":
        optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    run(task, optimizer, 4 if case == "few" else 60, observe=case != "no loss")
    stats = optimizer.stats()
    assert (stats.predictor, stats.deterministic) == ("slow_ema", None)
    assert reason in stats.reason
    assert not any("move_0" in entry for entry in optimizer.state.values())
    fresh = HybridOptimizer(Task().model.parameters()).stats()
    assert (fresh.predictor, fresh.deterministic) == ("slow_ema", None)


def test_memory_grows_once() -> None:
    task = Task()
    optimizer = task.optimizer()
    sizes = []
    for _ in range(80):
        run(task, optimizer, 1)
        sizes.append(optimizer.stats().state_bytes_device)
    first, last = sizes[0], sizes[-1]
    # The rows of one are given back before the next step makes those of the other.
    assert [size for size in sizes if size >= first] == sorted(sizes)[1:]
    assert set(sizes) == {min(sizes), first, last}
    elements = sum(param.numel() for param in task.model.parameters())
    matrices = [param.shape for param in task.model.parameters() if param.dim() == 2]
    bases = sum(m * m + n * n for m, n in matrices if min(m, n) > 1)
    assert bases > 0
    assert last - min(sizes) == 4 * ((2 * 4 + 2) * elements + bases)


def test_without_memory_for_the_pairs_it_goes_on_with_slow_ema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even a small part of them stays."""
    allocate = Batch._allocate

    def small(self: Batch, row: StateRow, offload: str) -> list[Tensor]:
        if row.name == "change_1":
            raise torch.OutOfMemoryError("no room")
        return allocate(self, row, offload)

    monkeypatch.setattr(Batch, "_allocate", small)
    task = Task()
    optimizer = task.optimizer()
    run(task, optimizer, 60)
    stats = optimizer.stats()
    assert (stats.predictor, stats.deterministic) == ("slow_ema", None)
    assert "no memory" in stats.reason
    assert stats.predicted_steps > 0
    assert not any("move_0" in entry for entry in optimizer.state.values())
    with pytest.raises(torch.OutOfMemoryError):
        run(task, task.optimizer(predictor="secant"), 1)


@pytest.mark.parametrize(
    ("backend", "offload", "inline"),
    [
        ("torch", "none", True), ("torch", "none", False), ("torch", "cpu", True),
        ("triton", "none", True), ("triton", "cpu", False),
    ],
)  # fmt: skip
def test_a_checkpoint_around_the_switch_goes_on_bit_for_bit(
    backend: str, offload: str, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every step from Warmup to secant's moves, with noise later: back and forth."""
    monkeypatch.setattr("triton_hybrid.offload.COPY_ON_CPU", True)
    options: dict[str, Any] = {"inline": inline, "offload": offload, "backend": backend}
    places = (5, 12, 13, 14, 15, 17, 19, 45) if backend == "torch" else (11, 14)
    task = Task()
    optimizer = task.optimizer(**options, warmup_steps=9)
    saved: dict[int, Any] = {}
    phases: dict[int, Phase] = {}
    count = 70 if backend == "torch" else 19  # the interpreter takes seconds for a move

    def train(its: Task, who: HybridOptimizer, first: int) -> None:
        for step in range(first, count):
            if its is task and step in places:
                buffer = io.BytesIO()
                torch.save(who.state_dict(), buffer)
                model = copy.deepcopy(its.model.state_dict())
                saved[step], phases[step] = (buffer, model), who.phase
            if step == 40:
                its.batch = 16
            its.generator.manual_seed(step)
            run(its, who, 1)

    train(task, optimizer, 0)
    assert (optimizer.stats().predictor == "secant") is (backend == "triton")
    for step, (buffer, model) in saved.items():
        other = Task()
        other.model.load_state_dict(model)
        other.batch = 96 if step <= 40 else 16
        fresh = other.optimizer(**options, warmup_steps=9)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert fresh.phase is phases[step]
        train(other, fresh, step)
        assert_same_weights(weights(fresh), weights(optimizer))
        left, right = fresh.stats().to_dict(), optimizer.stats().to_dict()
        for name in ("predictor", "deterministic", "reason", "rollbacks", "horizon"):
            assert left[name] == right[name], f"{name} after step {step}"
        fresh.state_dict()
        optimizer.state_dict()
        assert_same_state(state_copy(fresh), state_copy(optimizer))


@pytest.mark.parametrize("masters", ["auto", "split"])
def test_masters_follow(masters: str) -> None:
    """BF16 losses are too coarse for the test of the trapezoid, or fine enough: both must train."""
    task = Task(torch.bfloat16)
    optimizer = task.optimizer(master_weights=masters)
    before = task.measured()
    run(task, optimizer, 60)
    assert task.measured() < 0.5 * before


@pytest.mark.parametrize(
    "options", [{"maximize": True}, {"loss_scale": 64.0}, {"weight_decay": 0.3}]
)
def test_the_watch_knows_signs_scales_and_weight_decay(options: dict[str, Any]) -> None:
    task = Task(torch.float64)
    optimizer = task.optimizer(**options)
    sign, scale = (-1.0 if "maximize" in options else 1.0), options.get("loss_scale", 1.0)
    for _ in range(12):
        optimizer.zero_grad()
        loss = sign * task.loss()
        (scale * loss).backward()
        optimizer.observe_loss(loss.detach())
        optimizer.step()
    state = optimizer._engine.choice.state()  # type: ignore[union-attr]
    assert state["quiet_steps"] >= 10
    assert state["quiet_share"] > 0.9
    assert set(WATCH) <= set(state)


def test_a_step_that_was_not_made_is_not_compared() -> None:
    task = Task()
    optimizer = task.optimizer()
    run(task, optimizer, 4)
    known = optimizer._engine.choice.state()["quiet_steps"]  # type: ignore[union-attr]
    optimizer.zero_grad()
    task.loss().backward()
    next(iter(task.model.parameters())).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
    optimizer.observe_loss(task.loss().detach())
    optimizer.step()
    run(task, optimizer, 1)
    state = optimizer._engine.choice.state()  # type: ignore[union-attr]
    assert state["quiet_steps"] == known, "neither the slope after it nor the one before is known"
    run(task, optimizer, 1)
    assert optimizer._engine.choice.state()["quiet_steps"] == known + 1  # type: ignore[union-attr]


def test_it_is_its_reference_when_noise_begins() -> None:
    torch.manual_seed(0)
    config = HybridConfig(**SHORT)
    theirs = [torch.randn(9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    ours = [nn.Parameter(tensor.clone()) for tensor in theirs]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    reference, optimizer = Reference(theirs, config, **options), None
    optimizer = HybridOptimizer(ours, hybrid=config, **options)
    models = []
    for step in range(90):
        noise = 0.0 if step < 30 else 1.0
        gradients, loss = [], 0.0
        for weight in theirs:
            curvature = torch.linspace(0.3, 2.0, weight.numel(), dtype=torch.float64)
            centre = noise * torch.randn(weight.shape, dtype=torch.float64)
            away = curvature.view(weight.shape) * (weight - centre)
            loss += 0.5 * float((away * (weight - centre)).sum())
            gradients.append(away)
        for param, gradient in zip(ours, gradients):
            param.grad = gradient.clone()
        optimizer.observe_loss(loss)
        optimizer.step()
        reference.step(gradients, loss)
        models.append(reference.model)
        assert optimizer.stats().predictor == reference.model, f"step {step}"
        for param, weight in zip(ours, theirs):
            # Matrices are orthogonalised in FP32, which small singular values make much of.
            torch.testing.assert_close(param.detach(), weight, rtol=1e-3, atol=1e-3)
    assert models[-1] == "slow_ema"
    assert "secant" in models
