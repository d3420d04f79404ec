"""Adaptive accumulation: the noise scale, windows, and what they meet."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_memory import DEVICE
from torch import Tensor, nn
from training import (
    assert_same_weights,
    backward,
    make_batches,
    make_model,
    weights,
)

from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer
from triton_hybrid.accumulation import FIRST_INTERVAL, LONGEST_INTERVAL, rate_factor
from triton_hybrid.noise_scale import NoiseScale, squared_norm

OFF = HybridConfig(predictor="none")
FIXED = AccumulationConfig(3, minimum=3)


def make(
    accumulation: AccumulationConfig | None, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, HybridOptimizer]:
    model = make_model(dtype)
    options = {"lr": 1e-2, "hybrid": OFF, **options}
    return model, HybridOptimizer(model.parameters(), accumulation=accumulation, **options)


def train(
    model: nn.Module, optimizer: HybridOptimizer, micro_batches: int, batches: Any = None
) -> list[int]:
    """Runs the loop of the documentation; returns the lengths of the windows."""
    batches = batches or make_batches()
    windows, length = [], 0
    for _ in range(micro_batches):
        if optimizer.needs_backward:
            loss = scaled_backward(model, optimizer, next(batches))
            optimizer.observe_loss(loss)
            length += 1
        if optimizer.window_complete:
            if length:
                windows.append(length)
            length = 0
            optimizer.step()
            optimizer.zero_grad()
    return windows


def scaled_backward(
    model: nn.Module, optimizer: HybridOptimizer, batch: tuple[Tensor, Tensor]
) -> Tensor:
    if optimizer._settings.loss_scale is None:
        return backward(model, batch)
    dtype = next(model.parameters()).dtype
    loss = nn.functional.cross_entropy(model(batch[0].to(dtype)).float(), batch[1])
    optimizer.scale_loss(loss).backward()
    return loss.detach()


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"maximum": 0}, "maximum=0: must be an integer >= 1"),
        ({"maximum": 2.0}, "maximum=2.0"),
        ({"maximum": True}, "maximum=True"),
        ({"minimum": 0}, "minimum=0: must be an integer in"),
        ({"maximum": 4, "minimum": 5}, r"minimum=5: must be an integer in \[1, maximum=4\]"),
        ({"window": 5}, "window=5: unknown field"),
    ],
)
def test_bad_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccumulationConfig.from_dict(values)


def test_settings_survive_a_dictionary() -> None:
    config = AccumulationConfig(8, minimum=2)
    assert AccumulationConfig.from_dict(config.to_dict()) == config
    assert AccumulationConfig() == AccumulationConfig(maximum=4, minimum=1)


# ------------------------------------------------------------------------------------ noise scale


@given(
    dimensions=st.sampled_from((2000, 5000)),
    noise=st.sampled_from((0.25, 1.0, 4.0)),
    scale=st.sampled_from((1e-6, 1.0, 1e4)),
    length=st.integers(2, 6),
    seed=st.integers(0, 10_000),
)
def test_noise_scale_of_known_covariance(
    dimensions: int, noise: float, scale: float, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    deviation = torch.rand(dimensions, generator=generator, dtype=torch.float64) + 0.1
    deviation *= math.sqrt(noise * float(mean.square().sum() / deviation.square().sum()))
    measured = NoiseScale()
    for _ in range(200):
        total, squares = torch.zeros_like(mean), []
        for _ in range(length):
            total += mean + deviation * torch.randn(dimensions, generator=generator)
            squares.append(float((scale * total).square().sum()))
        measured.take(squares)
    assert measured.micro_batches == pytest.approx(noise, rel=0.1)


def test_noise_scale_follows_what_changes() -> None:
    """A gradient whose square falls by 10^6, and whose noise grows from a quarter to 4."""
    measured = NoiseScale()
    for index in range(300):
        noise = 0.25 if index < 150 else 4.0
        signal = 1e6 if index < 5 else 1.0
        measured.take([signal * (k * noise + k * k) for k in (1, 2, 3)])
    assert measured.micro_batches == pytest.approx(4.0, rel=0.2)


def test_without_noise_and_without_signal() -> None:
    measured = NoiseScale()
    assert math.isnan(measured.micro_batches)
    measured.take([5.0])  # one micro-batch tells nothing
    measured.take([math.nan, 1.0])
    measured.take([1.0, math.inf])
    assert math.isnan(measured.micro_batches)
    clear, noise = NoiseScale(), NoiseScale()
    clear.take([1.0, 4.0, 9.0])
    noise.take([1.0, 1.9, 2.5])
    assert clear.micro_batches == pytest.approx(0.0, abs=1e-12)
    assert noise.micro_batches == math.inf


@pytest.mark.parametrize("length", [2, 4])
def test_ranks_that_reduce_only_the_last_micro_batch_measure_the_same(length: int) -> None:
    ranks, noise = 4, 3.0  # in micro-batches of all ranks together
    squares = [k * ranks * noise + k * k for k in range(1, length)]
    squares.append(length * noise + length * length)
    measured = NoiseScale()
    measured.take(squares, [ranks] * (length - 1) + [1])
    assert measured.micro_batches == pytest.approx(noise)


def test_squared_norm_of_mixed_gradients() -> None:
    grads = [torch.full((3,), 2.0), torch.full((2, 2), 3.0, dtype=torch.float64), torch.empty(0)]
    grads.append(torch.full((1,), 300.0, dtype=torch.float16))  # its square is beyond FP16
    square = squared_norm([grad.to(DEVICE) for grad in grads])
    assert float(square) == pytest.approx(12.0 + 36.0 + 90000.0)


# ------------------------------------------------------------------------------------ fixed windows


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_fixed_window_is_one_large_batch(backend: str, max_grad_norm: float | None) -> None:
    options = {"backend": backend, "max_grad_norm": max_grad_norm}
    model, optimizer = make(FIXED, **options)
    other, expected = make(None, **options)
    batches, same = make_batches(), make_batches()
    for _ in range(12):
        assert train(model, optimizer, 3, batches) == [3]
        for _ in range(3):
            x, y = next(same)
            (nn.functional.cross_entropy(other(x), y) / 3).backward()
        expected.step()
        expected.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    norm = optimizer._engine.read()["norm"]  # type: ignore[union-attr]
    assert norm == pytest.approx(expected._engine.read()["norm"], rel=1e-5)  # type: ignore[union-attr]


@settings(max_examples=6)
@given(length=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_fixed_window_is_adamw_on_the_averaged_gradient(length: int, seed: int) -> None:
    model, optimizer = make(AccumulationConfig(length, minimum=length))
    other = copy.deepcopy(model)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2)
    batches, same = make_batches(seed), make_batches(seed)
    for _ in range(10):
        assert train(model, optimizer, length, batches) == [length]
        total = [torch.zeros_like(param) for param in other.parameters()]
        for _ in range(length):
            backward(other, next(same))
            for part, param in zip(total, other.parameters()):
                part += param.grad
            adamw.zero_grad()
        for part, param in zip(total, other.parameters()):
            param.grad = part / length
        adamw.step()
        adamw.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_fixed_window_measures_nothing() -> None:
    model, optimizer = make(FIXED)
    train(model, optimizer, 9)
    stats = optimizer.stats()
    assert (stats.windows, stats.micro_batches, stats.micro_batches_saved) == (3, 9, 0)
    assert stats.noise_scale is None
    assert "3 windows of 3.00 micro-batches, 0 saved" in str(stats)


def test_without_accumulation_every_gradient_is_a_window() -> None:
    model, optimizer = make(None)
    assert optimizer.window_complete
    assert optimizer.last_of_window
    assert train(model, optimizer, 4) == [1] * 4
    assert "windows" not in optimizer.state_dict()["param_groups"][0]["hybrid_progress"]


# -------------------------------------------------------------------------------- adaptive windows


class Quadratic:
    """Gradients G + noise at a point that never moves: a learning rate of 0 holds it."""

    def __init__(self, accumulation: AccumulationConfig, **options: Any) -> None:
        self.param = nn.Parameter(torch.zeros(4000, device=DEVICE))
        options = {"lr": 0.0, "hybrid": OFF, **options}
        self.optimizer = HybridOptimizer([self.param], accumulation=accumulation, **options)
        self.generator = torch.Generator().manual_seed(0)

    def run(self, windows: int, noise: float, early: bool = False) -> list[int]:
        """Lengths of windows at a noise scale; ``early``: asked for before the drop."""
        lengths = []
        for _ in range(windows):
            for count in range(1, 100):  # noqa: B007
                last = self.optimizer.last_of_window
                draw = torch.randn(4000, generator=self.generator) * math.sqrt(noise)
                (self.param * (1.0 + draw.to(DEVICE))).sum().backward()
                assert self.optimizer.window_complete == last
                assert self.optimizer.window_complete == last, "asked twice, counted twice"
                if last:
                    break
            lengths.append(count)
            self.optimizer.step()
            assert not early or self.optimizer.last_of_window in (True, False)
            self.optimizer.zero_grad()
        return lengths


def test_windows_shrink_and_grow_with_the_noise() -> None:
    run = Quadratic(AccumulationConfig(8))
    assert run.run(1, 0.5) == [8], "nothing is known yet"
    quiet = run.run(400, 0.5, early=True)
    assert set(quiet) == {1, 2}
    assert quiet.count(2) / len(quiet) < 0.04, "windows that only measure become rare"
    assert quiet[: FIRST_INTERVAL + 1] == [1] * FIRST_INTERVAL + [2]
    loud = run.run(4 * LONGEST_INTERVAL, 1e5)
    assert loud[-20:] == [8] * 20
    assert run.run(300, 0.5)[-1] == 1
    assert run.optimizer.stats().micro_batches_saved > 0


def test_a_minimum_is_kept() -> None:
    run = Quadratic(AccumulationConfig(4, minimum=2))
    assert run.run(30, 0.1) == [4] + [2] * 29
    assert run.optimizer.stats().noise_scale == pytest.approx(0.1, abs=0.1)


def test_a_measured_window_costs_one_small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Quadratic(AccumulationConfig(8))
    reads = []
    real = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        if tensor.dim() == 2 and tensor.shape[0] == 2:
            reads.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    lengths = run.run(60, 0.5)
    measured = sum(length > 1 for length in lengths[:-1])
    assert len(reads) == measured < 10
    assert max(reads) <= 16


# ------------------------------------------------------------------------------- what can go wrong


def test_gradients_that_nobody_counted_are_refused() -> None:
    model, optimizer = make(AccumulationConfig())
    backward(model, next(make_batches()))
    before = weights(optimizer)
    with pytest.raises(RuntimeError, match=r"window_complete .* not divided by their number"):
        optimizer.step()
    assert_same_weights(weights(optimizer), before)


def test_a_step_in_mid_window_averages_what_is_there() -> None:
    """The data has ended, say."""
    rate = rate_factor(2, 3, math.nan)
    (model, optimizer), (other, expected) = make(FIXED), make(None, lr=1e-2 * rate)
    batches, same = make_batches(), make_batches()
    for _ in range(2):
        backward(model, next(batches))
        assert not optimizer.window_complete
        x, y = next(same)
        (nn.functional.cross_entropy(other(x), y) / 2).backward()
    optimizer.step()
    expected.step()
    for mine, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_what_a_closure_computes_is_a_window() -> None:
    rate = rate_factor(1, 3, math.nan)
    (model, optimizer), (other, expected) = make(FIXED), make(None, lr=1e-2 * rate)
    batch = next(make_batches())
    loss = optimizer.step(lambda: backward(model, batch))
    assert loss == expected.step(lambda: backward(other, batch))
    assert_same_weights(weights(optimizer), weights(expected))
    optimizer.zero_grad()

    def whole_window() -> Tensor:
        while True:
            loss = backward(model, batch)
            if optimizer.window_complete:
                return loss

    optimizer.step(whole_window)
    assert optimizer.stats().micro_batches == 4


def with_a_window() -> tuple[nn.Module, HybridOptimizer, Any]:
    """A model whose gradients are those of a whole window; the batches that follow."""
    model, optimizer = make(FIXED)
    batches = make_batches()
    for _ in range(3):
        backward(model, next(batches))
        complete = optimizer.window_complete
    assert complete
    return model, optimizer, batches


def test_gradients_that_are_thrown_away_do_not_count() -> None:
    model, optimizer = make(FIXED)
    batches = make_batches()
    backward(model, next(batches))
    assert not optimizer.window_complete
    optimizer.zero_grad(set_to_none=False)
    assert train(model, optimizer, 3, batches) == [3]


def test_clipping_outside_is_no_micro_batch() -> None:
    model, optimizer, _ = with_a_window()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert optimizer.window_complete
    optimizer.step()
    assert optimizer.stats().micro_batches == 3


def test_a_step_that_a_scaler_left_out_ends_its_window() -> None:
    """FP32 gradients: the scaler does not call step, and the loop clears the model's gradients."""
    model, optimizer, batches = with_a_window()
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    kept = [param.grad for param in model.parameters()]  # nothing lands where they were
    assert kept[0] is not None
    kept[0].fill_(math.inf)
    scaler.step(optimizer)
    assert optimizer.stats().windows == 0
    model.zero_grad()
    assert train(model, optimizer, 3, batches) == [3]
    assert len(kept) == 4


def test_rate_factor_is_the_root_where_noise_is_all_and_one_where_there_is_none() -> None:
    assert rate_factor(1, 4, math.inf) == rate_factor(1, 4, math.nan) == 0.5
    assert rate_factor(1, 4, 0.0) == 1.0
    assert rate_factor(4, 4, 3.0) == 1.0
    assert 0.5 < rate_factor(1, 4, 3.0) < rate_factor(2, 4, 3.0) < 1.0
