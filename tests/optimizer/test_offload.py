"""Offloaded state: the same bits, in host memory between its uses."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    run_of,
    run_with_rejections,
    state_copy,
    train,
    until,
    weights,
)

from triton_hybrid import HybridOptimizer, Phase, offload
from triton_hybrid.offload import LONG_STRETCH, MovingRow, Offload
from triton_hybrid.state import Home, StepPlan, buffer_like

PREDICTORS = ("slow_ema", "secant", "linear", "auto", "none")
STRETCHES = {"short": {}, "long": {"max_predict_steps": 7, "correction_interval": 7}}


@pytest.fixture(autouse=True)
def _copies_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From host memory to host memory, so that the code that serves a GPU runs.

    What is not current is made unusable: memory that a row has left, and host memory while its
    row visits the device.
    """
    monkeypatch.setattr(offload, "COPY_ON_CPU", True)
    leave, bring = Offload._leave, Offload._bring

    def leave_nothing(self: Offload, row: MovingRow) -> None:
        for tensor in row.here or ():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        leave(self, row)

    def bring_all(self: Offload, plan: StepPlan) -> None:
        coming = [row for row in self._rows if row.row.when(plan) and row.here is None]
        bring(self, plan)
        for row in coming:
            for tensor in row.host or ():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(Offload, "_leave", leave_nothing)
    monkeypatch.setattr(Offload, "_bring", bring_all)


Drive = Callable[[nn.Module, HybridOptimizer], Any]


def assert_same_bits(
    drive: Drive, kind: str = "fp32", offload: str = "cpu", **options: Any
) -> HybridOptimizer:
    """Asserts that offloaded state changes no bit of a run; returns its optimizer."""
    runs = []
    for where in ("none", offload):
        model, optimizer = run_of(kind, offload=where, **options)
        drive(model, optimizer)
        optimizer.state_dict()  # brings host memory up to date in the middle of a stretch
        runs.append(optimizer)
    assert_same_weights(*map(weights, runs))
    assert_same_state(*map(state_copy, runs))
    assert runs[0].stats().rollbacks == runs[1].stats().rollbacks
    return optimizer


RUNS = [
    *itertools.product(("fp32", "bf16"), PREDICTORS, STRETCHES),
    *itertools.product(("lion", "muon"), ("slow_ema", "linear", "auto", "none"), ("short",)),
]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(("kind", "predictor", "stretch"), RUNS)
def test_same_bits_with_and_without(kind: str, predictor: str, stretch: str, inline: bool) -> None:
    def drive(model: nn.Module, optimizer: HybridOptimizer) -> None:
        run_with_rejections(model, optimizer, 60)

    options = {"predictor": predictor, "inline": inline, **STRETCHES[stretch]}
    found = assert_same_bits(drive, kind, "pinned" if inline else "cpu", **options)
    assert (found.stats().predicted_steps > 0) == (predictor != "none")


@pytest.mark.parametrize("predictor", ["slow_ema", "linear"])
def test_same_bits_in_the_kernels(predictor: str) -> None:
    """They find memory by address, and must not use that of a row that has left."""
    options = {"predictor": predictor, "inline": False, "backend": "triton", **STRETCHES["long"]}
    found = assert_same_bits(lambda model, opt: train(model, opt, 16), "bf16", **options)
    assert found.stats().predicted_steps > 3


def visiting(optimizer: HybridOptimizer) -> set[str]:
    """Names of rows on the device that are at home elsewhere."""
    rows = optimizer._engine.offload._rows
    return {row.name for row in rows if row.home is not Home.LENT and row.here is not None}


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_beyond_adamw_nothing_lies_on_the_device_between_steps(predictor: str) -> None:
    """At most 0.1 bytes a parameter, before every forward pass."""
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    config = fast_config(predictor=predictor, offload="cpu", inline=False)
    optimizer = HybridOptimizer(model.parameters(), hybrid=config)
    numbers = sum(param.numel() for param in model.parameters())
    phases = set()
    for _ in range(30):
        phases.add(optimizer.phase)
        if optimizer.needs_backward:
            model(torch.randn(4, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.needs_backward:
            assert not visiting(optimizer)
            stats = optimizer.stats()
            assert stats.state_bytes_device - 8 * numbers < 0.1 * numbers
            assert stats.state_bytes_host >= 5 * numbers * (predictor != "none")
    assert (Phase.CORRECT in phases) == (predictor != "none")


def test_host_bytes_are_those_of_the_rows() -> None:
    model = make_model()
    optimizer = HybridOptimizer(
        model.parameters(), hybrid=fast_config(offload="cpu", predictor="linear", inline=False)
    )
    train(model, optimizer, 3)
    numbers = sum(-(-param.numel() // 8) * 8 for param in model.parameters())
    # Slow EMA, snapshot and displacement, in FP32.
    assert optimizer.stats().state_bytes_host == 3 * 4 * numbers


def test_only_what_a_step_touches_is_fetched() -> None:
    model = make_model()
    config = fast_config(predictor="auto", offload="cpu", inline=False)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    seen: dict[Phase, set[str]] = {}
    place = Offload.place

    def noting(self: Offload, *args: Any, **options: Any) -> None:
        here = {row.name for row in self._rows if row.home is Home.HOST and row.here}
        seen.setdefault(phase, set()).update(here)
        place(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offload, "place", noting)
        batches = make_batches()
        for _ in range(30):
            phase = optimizer.phase
            train(model, optimizer, 1, batches)
    # auto follows the slow EMA here, and nothing else is there.
    assert seen[Phase.WARMUP] == {"slow_ema"}
    assert seen[Phase.PREDICT] == {"slow_ema", "residue", "direction"}
    assert seen[Phase.CORRECT] == {"slow_ema", "residue", "direction"}


@pytest.mark.parametrize("passes", [1, 3])
def test_fetched_in_the_middle_of_the_last_backward_pass(passes: int) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    batches = make_batches()
    came: list[int] = []
    for window in range(4):
        arrived = 0
        for _ in range(passes):
            assert not visiting(optimizer) if window else True
            backward(model, next(batches))
            arrived += 1
            if window and visiting(optimizer):
                came.append(arrived)
                break
        for _ in range(passes - arrived):
            backward(model, next(batches))
        optimizer.step()
        optimizer.zero_grad()
    # The first window sets the hooks, the second one counts.
    assert came == [passes, passes]


@pytest.mark.parametrize("later", [1, 2, 5])
def test_windows_of_another_length_than_before(later: int) -> None:
    def drive(model: nn.Module, optimizer: HybridOptimizer) -> None:
        batches = make_batches()
        for passes in (3, 3, 3, later, 1, later, 2):
            for _ in range(passes):
                backward(model, next(batches))
            optimizer.step()
            optimizer.zero_grad()

    assert_same_bits(drive)


def test_gradients_without_a_backward_pass() -> None:
    def drive(model: nn.Module, optimizer: HybridOptimizer) -> None:
        for step in range(12):
            for param in model.parameters():
                param.grad = torch.sin(param.detach() + step)
            optimizer.step()

    assert_same_bits(drive)


def test_no_room_in_the_backward_pass_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    usual = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    tight = HybridOptimizer(twin.parameters(), hybrid=fast_config(offload="cpu"))
    train(model, usual, 6)
    refused = []

    def full(*args: Any, **options: Any) -> Any:
        refused.append(1)
        raise torch.OutOfMemoryError("no room")

    arrived = Offload.gradient_arrived

    def without_room(self: Offload) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "buffer_like", full)
            arrived(self)

    monkeypatch.setattr(Offload, "gradient_arrived", without_room)
    train(twin, tight, 6)
    assert len(refused) == 4
    assert_same_weights(weights(usual), weights(tight))


@pytest.mark.parametrize("predictor", ["linear", "slow_ema"])
def test_moments_leave_for_a_long_stretch_of_a_trajectory(predictor: str) -> None:
    model = make_model()
    config = fast_config(
        predictor=predictor, offload="cpu", inline=False, max_predict_steps=8, correction_interval=8
    )
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    until(optimizer, model, Phase.PREDICT)
    numbers = sum(param.numel() for param in model.parameters())
    at_home = optimizer.stats()
    away = []
    while optimizer.phase is Phase.PREDICT:
        optimizer.step()
        entry = optimizer.state[next(model.parameters())]
        assert entry["exp_avg"].isfinite().all()
        away.append(optimizer._engine.offload.is_away("exp_avg"))
    # The first prediction measures its slope along them.
    assert away == [predictor != "slow_ema"] * 8
    stats = optimizer.stats()
    if predictor != "slow_ema":
        assert stats.state_bytes_device < at_home.state_bytes_device - 8 * numbers
        assert stats.state_bytes_host > at_home.state_bytes_host
    train(model, optimizer, 1)
    assert not optimizer._engine.offload.is_away("exp_avg")
    backward(model, next(make_batches()))


def test_their_place_in_host_memory_is_there_from_the_first_step() -> None:
    """Memory does not grow after it."""
    made = []
    for interval in (8, 2):
        model = make_model()
        config = fast_config(
            predictor="linear", offload="cpu", inline=False,
            max_predict_steps=8, correction_interval=interval,
        )  # fmt: skip
        optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
        train(model, optimizer, 1)
        rows = optimizer._engine.offload._rows
        made.append([row.host is not None for row in rows if row.home is Home.LENT])
    assert made == [[True, True], [False, False]]


def test_moments_stay_where_the_stretch_is_short() -> None:
    model = make_model()
    steps = LONG_STRETCH
    config = fast_config(
        predictor="linear", offload="cpu", inline=False,
        max_predict_steps=steps, correction_interval=steps,
    )  # fmt: skip
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    until(optimizer, model, Phase.PREDICT)
    while optimizer.phase is Phase.PREDICT:
        optimizer.step()
        assert not optimizer._engine.offload.is_away("exp_avg")


@pytest.mark.parametrize("predictor", ["slow_ema", "linear"])
def test_weights_written_by_others_while_state_visits(predictor: str) -> None:
    def drive(model: nn.Module, optimizer: HybridOptimizer) -> None:
        until(optimizer, model, Phase.PREDICT)
        train(model, optimizer, 2)
        assert optimizer.phase is Phase.PREDICT
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        train(model, optimizer, 30, make_batches(3))

    options = {"max_predict_steps": 6, "correction_interval": 6, "inline": False}
    assert_same_bits(drive, predictor=predictor, **options)


@pytest.mark.parametrize("kinds", [("cpu", "cpu"), ("none", "cpu"), ("cpu", "none")], ids=str)
@given(stop=st.integers(4, 23), predictor=st.sampled_from(("slow_ema", "linear")))
def test_checkpoint_goes_on_bit_for_bit(stop: int, kinds: tuple[str, str], predictor: str) -> None:
    """Also in the middle of a stretch, and from one kind of memory to the other."""
    options: dict[str, Any] = {"predictor": predictor, "inline": False, **STRETCHES["long"]}
    model = make_model()
    config = fast_config(offload=kinds[0], **options)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    train(model, optimizer, stop)
    twin = copy.deepcopy(model)
    changed = fast_config(offload=kinds[1], **options)
    other = HybridOptimizer(twin.parameters(), lr=1e-2, hybrid=changed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for left, right in ((optimizer, model), (other, twin)):
        train(right, left, 25, make_batches(9))
        left.state_dict()  # in the middle of a stretch, brings the state up to date
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))


def test_device_memory_is_what_it_was_after_every_cycle() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    train(model, optimizer, 2)
    before = optimizer.stats()
    train(model, optimizer, 60)
    after = optimizer.stats()
    assert after.state_bytes_device == before.state_bytes_device
    assert after.state_bytes_host == before.state_bytes_host


def test_hooks_go_with_the_optimizer() -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    train(model, optimizer, 3)

    def hooks() -> int:
        return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())

    count = len(list(model.parameters()))
    assert hooks() == count
    optimizer.load_state_dict(optimizer.state_dict())
    assert hooks() == 0
    train(model, optimizer, 1)
    assert hooks() == count
    twin = copy.deepcopy(model)
    assert all(not p._post_accumulate_grad_hooks for p in twin.parameters())
    gone = weakref.ref(optimizer._engine.offload)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks() == 0


def test_on_the_cpu_nothing_is_copied_and_nobody_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one memory only: the state is counted as the host's, and stays where it is."""
    monkeypatch.setattr(offload, "COPY_ON_CPU", False)
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(offload="cpu"))
    train(model, optimizer, 5)
    assert not optimizer._engine.offload._rows
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert optimizer.stats().state_bytes_host > 0


def test_a_row_is_one_buffer_in_the_order_of_its_parameters() -> None:
    params = [
        torch.empty(3, 5), torch.empty(4, 6).t(), torch.empty(()), torch.empty(0, 3),
        torch.empty(17), torch.empty(2, 3, 4).permute(2, 0, 1),
    ]  # fmt: skip
    views = buffer_like(params, torch.float32, torch.device("cpu"))
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    for value, (param, view) in enumerate(zip(params, views)):
        assert (view.shape, view.stride()) == (param.shape, torch.empty_like(param).stride())
        assert view.storage_offset() % 8 == 0
        view.fill_(value)
    # None lies on another.
    assert all(bool((view == value).all()) for value, view in enumerate(views))
