"""The verdict: kernel and reference agree on any ledger, and the rules are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    Arena,
    assert_ledgers_near,
    assert_near,
    assert_same_bits,
    counted_launches,
    more,
)
from torch import Tensor
from triton_hybrid.kernels.divergence import (
    BLOCKED_LIMIT,
    HORIZON_GROWTH,
    LARGEST_FRACTION,
    LARGEST_SCALE,
    SMALLEST_FRACTION,
    SMALLEST_SCALE,
    judge,
    judge_reference,
)
from triton_hybrid.kernels.ledger import FIELDS, read_ledger, write_ledger

Judge = Callable[[Tensor, Tensor, Tensor, float, float], None]
BACKENDS = pytest.mark.parametrize("judge", [judge, judge_reference], ids=["triton", "torch"])


def any_of(*values: float) -> st.SearchStrategy[float]:
    return st.sampled_from(values)


LEDGERS = st.fixed_dictionaries(
    {
        "moved": any_of(1.0, 1.0, 0.0),
        "stretch": any_of(1.0, 5.0),
        "jump_square": any_of(0.5),
        "blocked": any_of(0.0, 1.0, 2.0, 7.0),
        "norm_count": any_of(0.0, 1.0, 2.0, 50.0),
        "norm_mean": any_of(-69.0, -1.0, 0.0, 1.5),
        "norm_variance": any_of(0.0, 0.04, 1.0),
        "loss": any_of(math.nan, math.inf, -math.inf, 1.0, 2.0, 2.5, 9.0),
        "loss_previous": any_of(math.nan, 2.0, -2.0, 0.0),
        "loss_count": any_of(0.0, 1.0, 2.0, 30.0),
        "loss_mean": any_of(0.0, -0.1, 0.3),
        "loss_variance": any_of(0.0, 0.01, 1.0),
        "signal": any_of(0.0, 0.25, 1.0),
        "horizon": any_of(1.0, 0.875, 0.125),
        "rejections": any_of(0.0, 1.0, 9.0, 10.0, 11.0, 40.0),
        "rejected": any_of(0.0, 3.0),
        "accepted": any_of(0.0, 3.0),
        "verdict": any_of(0.0, 1.0, 2.0),
        "hold": any_of(0.0, 1.0),
        "found_inf": any_of(0.0, 0.0, 1.0),
        "step_fraction": any_of(1.0, 0.5),
        "cooldown": any_of(0.0, 4.0),
        "cause_norm": any_of(0.0, 2.0),
    }
)
"""Any ledger; every decision has drawn values on both sides of its border."""


@more(60)
@given(
    entries=LEDGERS,
    tensors=st.sampled_from((1, 2, 5, 127, 128, 129, 300)),
    norm=any_of(0.0, 1.0, 4.0, 90.0, math.inf),
    bad=any_of(0.0, 0.0, 0.0, 1.0),
    threshold=any_of(0.5, 2.5, 8.0),
    cooldown=any_of(1.0, 10.0),
    seed=st.integers(0, 999),
)
def test_the_kernel_is_its_reference(
    device: torch.device,
    entries: dict[str, Any],
    tensors: int,
    norm: float,
    bad: float,
    threshold: float,
    cooldown: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(tensors, 3, generator=generator, dtype=torch.float64)
    sums[:, 1] = norm * norm / tensors
    sums[:, 2] = 0.0
    if bad:
        sums[seed % tensors] = torch.tensor([math.nan, math.nan, bad])
    memory = torch.randn(tensors, 3, generator=generator)
    memory[:, 0] = memory[:, 0].abs().clamp(0.1, 4.0)
    results = []
    for decide in (judge, judge_reference):
        arena = Arena(device)
        ledger = arena.put(write_ledger(entries, torch.device("cpu")))
        mine, given_ = arena.put(memory), arena.put(sums)
        decide(ledger, given_, mine, threshold, cooldown)
        arena.check()
        assert_same_bits(given_, sums.to(device), "the sums")
        results.append((ledger, mine))
    assert_ledgers_near(results[0][0], results[1][0], rtol=1e-12)
    assert_near(results[0][1], results[1][1], "memory", rtol=1e-6, atol=0)
    after = read_ledger(results[0][0])
    verdict = after["verdict"]
    untouched = set(FIELDS) - {
        "moved", "stretch", "jump_square", "blocked", "verdict", "accepted", "rejections",
        "horizon", "step_fraction", "rejected", "cooldown", "hold", "loss",
        "cause_nonfinite", "cause_norm", "cause_loss",
    }  # fmt: skip
    for name in untouched:
        then = entries.get(name, 0.0)
        assert after[name] == then or math.isnan(then), name
    fractions = results[0][1][:, 2]
    if verdict == 2:
        assert (fractions == 0).all()
    elif verdict == 0:
        assert torch.equal(fractions.cpu(), memory[:, 2]), "nothing was decided"
    else:
        assert SMALLEST_FRACTION.value <= float(fractions.min())
        assert float(fractions.max()) <= LARGEST_FRACTION.value
    if not entries["moved"]:
        assert verdict == 0, "nothing moved, so there is nothing to judge"


# -------------------------------------------------------------------------------- the rules


def verdict(
    judge: Judge,
    device: torch.device,
    *,
    sums: Sequence[Sequence[float]] = ((0.0, 1.0, 0.0),),
    memory: Sequence[Sequence[float]] = ((1.0, 0.0, math.nan),),
    threshold: float = 3.0,
    **entries: Any,
) -> tuple[dict[str, float], Tensor]:
    """Judges a move after ordinary steps: norm about 1, loss about 2."""
    start = {
        "moved": 1.0, "stretch": 2.0, "jump_square": 0.5, "norm_count": 20.0, "loss_count": 20.0,
        "loss_previous": 2.0, "loss_variance": 0.01, "loss": math.nan, "horizon": 0.5,
    }  # fmt: skip
    ledger = write_ledger({**start, **entries}, device)
    cells = torch.tensor(memory, device=device)
    judge(ledger, torch.tensor(sums, dtype=torch.float64, device=device), cells, threshold, 10.0)
    return read_ledger(ledger), cells


@BACKENDS
@pytest.mark.parametrize(
    "entries",
    [{}, {"loss": 2.25}, {"loss": -50.0}, {"loss": 9.0, "loss_count": 1.0}, {"rejections": 3.0}],
    ids=str,
)
def test_an_ordinary_gradient_accepts(
    device: torch.device, judge: Judge, entries: dict[str, Any]
) -> None:
    after, memory = verdict(judge, device, **entries)
    assert (after["verdict"], after["accepted"], after["rejected"]) == (1, 1, 0)
    assert (after["moved"], after["stretch"], after["jump_square"]) == (0, 0, 0)
    assert (after["rejections"], after["hold"], after["cooldown"]) == (0, 0, 0)
    assert after["horizon"] == 0.5 * HORIZON_GROWTH.value
    assert memory[0].tolist() == [1, 0, 1]


@BACKENDS
@pytest.mark.parametrize(
    ("entries", "norm", "cause"),
    [
        ({"loss": 2.5}, 1.0, "cause_loss"),
        ({"loss": math.inf}, 1.0, "cause_loss"),
        ({"loss": -math.inf}, 1.0, "cause_loss"),
        ({"loss": math.inf, "loss_count": 0.0, "loss_previous": math.nan}, 1.0, "cause_loss"),
        ({}, 3.4, "cause_norm"),
        ({}, math.inf, "cause_norm"),
        ({"norm_variance": 1.0}, 25.0, "cause_norm"),
    ],
    ids=str,
)
def test_what_is_out_of_the_ordinary_rejects(
    device: torch.device, judge: Judge, entries: dict[str, Any], norm: float, cause: str
) -> None:
    after, memory = verdict(judge, device, sums=[[0.0, norm**2, 0.0]], **entries)
    causes = {name: after[name] for name in after if name.startswith("cause")}
    assert causes == {**dict.fromkeys(causes, 0), cause: 1}
    assert (after["verdict"], after["accepted"], after["rejected"]) == (2, 0, 1)
    assert (after["moved"], after["stretch"], after["jump_square"]) == (0, 0, 0)
    assert (after["rejections"], after["hold"], after["cooldown"]) == (1, 1, 10)
    assert after["horizon"] == 0.25
    assert math.isnan(after["loss"]), "of a point that was left again"
    assert memory[0].tolist() == [1, 0, 0]


@BACKENDS
@pytest.mark.parametrize(
    ("entries", "norm"),
    [
        ({"norm_variance": 1.0}, 15.0),
        ({"norm_count": 1.0}, 1e6),
        ({"loss": 2.25, "loss_variance": 0.0, "loss_previous": 100.0}, 1.0),
    ],
    ids=str,
)
def test_spread_and_experience_are_respected(
    device: torch.device, judge: Judge, entries: dict[str, Any], norm: float
) -> None:
    after, _ = verdict(judge, device, sums=[[0.0, norm**2, 0.0]], **entries)
    assert after["verdict"] == 1


@BACKENDS
def test_one_nonfinite_gradient_is_left_to_the_scaler_two_are_the_points_fault(
    device: torch.device, judge: Judge
) -> None:
    bad = [[math.nan, math.inf, 1.0]]
    memory = [[1.5, -2.0, math.nan]]
    limit = int(BLOCKED_LIMIT.value)
    for blocked in range(limit - 1):
        after, cells = verdict(judge, device, sums=bad, memory=memory, blocked=float(blocked))
        assert (after["verdict"], after["blocked"], after["moved"]) == (0, blocked + 1, 1)
        assert (after["stretch"], after["jump_square"], after["hold"]) == (2, 0.5, 0)
        assert cells[0, :2].tolist() == [1.5, -2], "still away, with what is known of the move"
        assert cells[0, 2].isnan(), "and nothing was decided"
    after, cells = verdict(judge, device, sums=bad, memory=memory, blocked=limit - 1.0)
    assert (after["verdict"], after["blocked"], after["moved"]) == (2, 0, 0)
    assert (after["cause_nonfinite"], after["cause_norm"], after["cause_loss"]) == (1, 0, 0)
    assert cells[0].tolist() == [1.5, 0, 0]
    after, _ = verdict(judge, device, blocked=1.0)
    assert (after["verdict"], after["blocked"]) == (1, 0), "a finite gradient clears the record"


@BACKENDS
def test_the_step_fraction_is_the_secant_rule(device: torch.device, judge: Judge) -> None:
    """Slopes a before and b after: the minimum lies at a / (a - b)."""
    a_and_b = [(-1.0, 1.0), (-1.0, 3.0), (-3.0, -1.0), (-1.0, -0.9), (-1.0, 99.0), (-1.0, -2.0),
               (1.0, 2.0), (0.0, 1.0), (-1.0, 0.0005)]  # fmt: skip
    expected = [0.5, 0.25, 1.5, 2.0, 0.1, 1.0, 1.0, 1.0, 1.0]
    sums = [[b, 0.01, 0.0] for _, b in a_and_b]
    memory = [[1.0, a, math.nan] for a, _ in a_and_b]
    after, cells = verdict(judge, device, sums=sums, memory=memory, signal=1.0)
    assert cells[:, 2].tolist() == pytest.approx(expected)
    assert cells[:, 0].tolist() == pytest.approx([max(0.125, f) for f in expected])
    assert cells[:, 1].tolist() == [0] * len(expected)
    assert after["step_fraction"] == pytest.approx(sum(expected) / len(expected))
    # Noise makes single slopes worthless: the correction shrinks with the signal share,
    # and where half of the squared gradient is noise there is none.
    _, cells = verdict(judge, device, sums=sums, memory=memory, signal=0.55)
    assert cells[:, 2].tolist() == pytest.approx([1 + 0.1 * (f - 1) for f in expected])
    for signal in (0.0, 0.1, 0.5):
        stretched = [[2.0, a, math.nan] for a, _ in a_and_b]
        _, cells = verdict(judge, device, sums=sums, memory=stretched, signal=signal)
        assert cells[:, 2].tolist() == [1.0] * len(expected)
        assert cells[:, 0].tolist() == pytest.approx([1.9] * len(expected))


@BACKENDS
def test_horizons_stay_in_their_range(device: torch.device, judge: Judge) -> None:
    sums, memory = [[3.0, 0.01, 0.0], [-1.0, 0.01, 0.0]], [[0.2, -1.0, 1.0], [3.0, -3.0, 1.0]]
    after, cells = verdict(judge, device, sums=sums, memory=memory, signal=1.0, horizon=0.9)
    assert cells[:, 0].tolist() == [SMALLEST_SCALE.value, LARGEST_SCALE.value]
    assert after["horizon"] == 1.0


@BACKENDS
def test_a_rejection_keeps_the_horizon_of_each_tensor(device: torch.device, judge: Judge) -> None:
    memory = [[0.2, -1.0, 1.0], [3.0, -3.0, 1.0]]
    sums = [[3.0, 1e6, 0.0], [-1.0, 0.01, 0.0]]
    after, cells = verdict(judge, device, sums=sums, memory=memory, signal=1.0)
    assert after["verdict"] == 2
    assert cells[:, 0].tolist() == pytest.approx([0.2, 3.0])


def test_launch_counts(device: torch.device) -> None:
    with counted_launches() as log:
        verdict(judge, device)
    assert log == ["_judge_kernel"]


def test_five_runs_give_the_same_bits(device: torch.device) -> None:
    sums = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).abs().tolist()
    memory = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)).tolist()
    quiet = [[a, b, 0.0] for a, b, _ in sums]
    runs = [
        verdict(judge, device, sums=quiet, memory=memory, signal=1.0, norm_mean=3.0)
        for _ in range(5)
    ]
    assert runs[0][0]["verdict"] == 1
    for after, cells in runs[1:]:
        assert_same_bits(cells, runs[0][1], "memory")
        assert str(after) == str(runs[0][0])
