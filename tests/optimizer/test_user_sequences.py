"""Random sequences of what users do between two steps, and what must hold after each of them.

Nobody's write is lost; no weight jumps by more than a step and the prediction after it could move
it; phase, counters and state agree; and with ``predictor="none"`` the weights are AdamW's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import same_bits, short_config

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

RATES = (1e-3, 3e-3)
JUMP = 40 * max(RATES)
"""More than a step moves a weight, the prediction that it verifies and the one after it
included, and less than any write does."""


class Life:
    """An optimizer, its parameters, and what their user remembers.

    The third parameter waits outside until a group is added. ``pinned`` are frozen weights that
    somebody wrote: they stay.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(4, 3, generator=generator) for _ in range(3)]
        self.params = [nn.Parameter(values.to(dtype)) for values in drawn]
        self.optimizer = make(self.params[:2])
        self.saved: Any = None
        self.pinned: dict[int, Tensor] = {}
        self.told: Any = None  # phase and stats after the last action
        self.verified = drawn  # weights, before a gradient that is not finite

    @property
    def hybrid(self) -> bool:
        return isinstance(self.optimizer, HybridOptimizer)

    @property
    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]

    def rewrite(self, index: int, write: Callable[[nn.Parameter], None]) -> None:
        param = self.params[index]
        write(param)
        if not param.requires_grad:
            self.pinned[index] = param.detach().clone()


# --------------------------------------------------------------------------- what users do
# Each takes the life and a drawn number in [0, 1000).


def take_gradient(life: Life, drawn: int, spread: float = 1.0) -> bool:
    """Fills the gradients, if anybody wants them."""
    if life.hybrid and not life.optimizer.needs_backward:
        return False
    generator = torch.Generator().manual_seed(drawn)
    for param in life.params:
        gradient = spread * (1 + 0.5 * torch.randn(param.shape, generator=generator))
        param.grad = gradient.to(param.dtype) if param.requires_grad else None
    return True


def step(life: Life, drawn: int) -> None:
    take_gradient(life, drawn)
    life.optimizer.step()
    life.optimizer.zero_grad()


def step_large(life: Life, drawn: int) -> None:
    """A gradient that a prediction is rolled back for."""
    take_gradient(life, drawn, 1e4)
    life.optimizer.step()
    life.optimizer.zero_grad()


def step_clipped(life: Life, drawn: int) -> None:
    if take_gradient(life, drawn, 100.0):
        nn.utils.clip_grad_norm_(life.params, 1.0)
    life.optimizer.step()
    life.optimizer.zero_grad()


def step_without_gradients(life: Life, drawn: int) -> None:
    """A backward that was skipped: for all parameters, or for one."""
    if take_gradient(life, drawn):
        for param in life.params if drawn % 2 else life.params[:1]:
            param.grad = None
    life.optimizer.step()


def step_nan(life: Life, drawn: int) -> None:
    """Not finite: our step skips it, for AdamW its user does."""
    if not life.hybrid:
        return
    if take_gradient(life, drawn):
        for param in life.params[:1]:
            if param.grad is None:
                return
            param.grad[drawn % 4, 0] = (math.nan, math.inf)[drawn % 2]
    with life.optimizer.verified_weights():
        life.verified = life.weights
    life.optimizer.step()
    life.optimizer.zero_grad()


@torch.no_grad()
def fill(param: nn.Parameter, drawn: int) -> None:
    param.fill_(drawn % 9 - 4.0)


def write(life: Life, drawn: int) -> None:
    life.rewrite(drawn % 3, lambda param: fill(param, drawn))


def write_data(life: Life, drawn: int) -> None:
    life.rewrite(drawn % 3, lambda param: param.data[drawn % 4].fill_(drawn % 9 - 4.0))


def swap_data(life: Life, drawn: int) -> None:
    def swap(param: nn.Parameter) -> None:
        param.data = param.data.flip(0) + (drawn % 5 - 2.0)

    life.rewrite(drawn % 3, swap)


def move_data(life: Life, drawn: int) -> None:
    """The same values, elsewhere: after it a frozen weight need not stand still yet."""
    for param in life.params:
        param.data = param.data.clone()


def freeze(life: Life, drawn: int) -> None:
    life.params[drawn % 2].requires_grad_(False).grad = None


def unfreeze(life: Life, drawn: int) -> None:
    for index, param in enumerate(life.params):
        param.requires_grad_(True)
        life.pinned.pop(index, None)


def add_group(life: Life, drawn: int) -> None:
    if len(life.optimizer.param_groups) == 1:
        life.optimizer.add_param_group({"params": [life.params[2]], "lr": RATES[drawn % 2]})


def save(life: Life, drawn: int) -> None:
    life.saved = life.weights, copy.deepcopy(life.optimizer.state_dict())


def load(life: Life, drawn: int) -> None:
    """The checkpoint with its weights, or beside the present ones."""
    if life.saved is None or len(life.saved[1]["param_groups"]) != len(life.optimizer.param_groups):
        return
    for index, values in enumerate(life.saved[0]):
        if drawn % 2:
            life.rewrite(index, lambda param, values=values: param.data.copy_(values))
    life.optimizer.load_state_dict(copy.deepcopy(life.saved[1]))


def clear_state(life: Life, drawn: int) -> None:
    if drawn % 2:
        life.optimizer.state.clear()
    else:
        life.optimizer.state.pop(life.params[0], None)


def change_rate(life: Life, drawn: int) -> None:
    for group in life.optimizer.param_groups:
        group["lr"] = RATES[drawn % 2]


def copied(life: Life, drawn: int) -> None:
    life.params, life.optimizer = copy.deepcopy((life.params, life.optimizer))


STEPS = (step, step_large, step_clipped, step_without_gradients, step_nan)
WRITES = (write, write_data, swap_data, load)
OTHERS = (
    move_data, freeze, unfreeze, add_group, save, clear_state, change_rate, copied,
)  # fmt: skip
ACTIONS = st.lists(
    st.tuples(
        # Most of a life are steps.
        st.sampled_from((step,) * 12 + STEPS + WRITES + OTHERS),
        st.integers(0, 999),
    ),
    min_size=8,
    max_size=40,
)

# -------------------------------------------------------------------------- what must hold


def check(life: Life, action: Any, before: list[Tensor]) -> None:
    """What holds after every action."""
    optimizer, now = life.optimizer, life.weights
    for index, (old, new) in enumerate(zip(before, now)):
        assert bool(torch.isfinite(new).all()), f"weight {index} after {action.__name__}"
        if action in STEPS:
            rounding = 2 * torch.finfo(new.dtype).eps * old.abs()
            jump = (new - old).abs() - rounding
            assert float(jump.max()) <= JUMP, f"weight {index} jumps in {action.__name__}"
        elif action not in WRITES:
            assert same_bits(old, new), f"weight {index} moves in {action.__name__}"
    for index, values in life.pinned.items():
        assert same_bits(now[index], values), f"frozen weight {index} is not what was written"
    stats = optimizer.stats()
    phase, past = life.told or (optimizer.phase, stats)
    life.told = optimizer.phase, stats
    skipped = stats.skipped_nonfinite > past.skipped_nonfinite
    if action is step_nan and skipped and stats.rollbacks == past.rollbacks:
        assert optimizer.phase is phase, "a step that was skipped counts"
        assert stats.predicted_steps == past.predicted_steps
        # A second one in a row takes a prediction back, which does not count after a write.
        assert any(all(map(same_bits, stood, now)) for stood in (before, life.verified))
    assert isinstance(optimizer.phase, Phase)
    assert optimizer.needs_backward == optimizer.phase.needs_gradient
    assert not (optimizer.hybrid.inline and optimizer.phase is Phase.PREDICT)
    assert stats.steps == sum(stats.steps_per_phase.values())
    assert 0 < stats.horizon <= 1
    for param, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                assert bool(torch.isfinite(value).all()), f"state {name} after {action.__name__}"
                assert (
                    value.ndim == 0
                    or name not in ("exp_avg", "exp_avg_sq", "master")
                    or (value.shape == param.shape)
                )
    taken = action in (step, step_large, step_clipped)  # with a gradient for all of them
    if taken and optimizer.phase in (Phase.WARMUP, Phase.FULL):
        for param in life.params:
            master = optimizer.state.get(param, {}).get("master")
            if master is not None and param.requires_grad:
                assert same_bits(master.to(param.dtype), param.detach())


def resumed(life: Life, make: Callable[[list[nn.Parameter]], Any]) -> Life:
    """Another process, which goes on from a checkpoint of now."""
    twin = Life(make, life.params[0].dtype)
    if len(life.optimizer.param_groups) > 1:
        add_group(twin, 0)
    for param, other in zip(twin.params, life.params):
        param.data.copy_(other.data)
        param.requires_grad_(other.requires_grad)
    twin.pinned = life.pinned
    twin.optimizer.load_state_dict(copy.deepcopy(life.optimizer.state_dict()))
    assert twin.optimizer.phase is life.optimizer.phase
    return twin


def check_checkpoints(life: Life, make: Callable[[list[nn.Parameter]], Any]) -> None:
    """No write of now is lost by a checkpoint; one after the next step goes on bit for bit."""
    for settled in (False, True):
        twin = resumed(life, make)
        for drawn in range(5):
            for each in (life, twin):
                before = each.weights
                step(each, drawn)
                check(each, step, before)
            if settled:
                assert twin.optimizer.phase is life.optimizer.phase
                assert all(map(same_bits, life.weights, twin.weights))


@pytest.mark.parametrize("masters", ["fp32", "auto", "split"])
@pytest.mark.parametrize("base", ["adamw", "muon", "lion"])
@settings(max_examples=settings().max_examples // 2)  # each is a whole life
@given(
    actions=ACTIONS,
    inline=st.booleans(),
    predictor=st.sampled_from(["slow_ema", "linear"]),
    warmup=st.integers(0, 2),
)
@example(  # two gradients in a row that are not finite, of a prediction that has lost its group
    actions=[(each, 0) for each in (*[step] * 10, step_nan, add_group, step_nan)],
    inline=False,
    predictor="slow_ema",
    warmup=0,
)
def test_nobodys_write_is_lost(
    base: str, masters: str, actions: Any, inline: bool, predictor: str, warmup: int
) -> None:
    def make(params: list[nn.Parameter]) -> HybridOptimizer:
        return HybridOptimizer(
            params,
            RATES[0],
            base=base,
            master_weights="auto" if masters == "fp32" else masters,
            hybrid=short_config(inline=inline, predictor=predictor, warmup_steps=warmup),
        )

    life = Life(make, torch.float32 if masters == "fp32" else torch.bfloat16)
    for action, drawn in actions:
        before = life.weights
        action(life, drawn)
        check(life, action, before)
    check_checkpoints(life, make)


@given(actions=ACTIONS)
def test_without_predictions_it_is_adamw(actions: Any) -> None:
    ours = Life(
        lambda params: HybridOptimizer(params, RATES[0], hybrid=HybridConfig(predictor="none")),
        torch.float32,
    )
    theirs = Life(lambda params: torch.optim.AdamW(params, RATES[0]), torch.float32)
    for action, drawn in actions:
        before = ours.weights
        action(ours, drawn)
        action(theirs, drawn)
        check(ours, action, before)
        for index, (a, b) in enumerate(zip(ours.weights, theirs.weights, strict=True)):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), f"{index} after {action.__name__}"
