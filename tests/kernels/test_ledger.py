"""The ledger and its decisions: both backends agree on any ledger, and the rules are as said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import counted_launches
from kernel_memory import DEVICE, Arena, assert_near, assert_same_bits
from kernel_problems import assert_ledgers_near
from kernel_specs import more
from torch import Tensor
from triton_hybrid.kernels import ledger as rules
from triton_hybrid.kernels.ledger import INDEX, decide, new_ledger, read_ledger, write_ledger
from triton_hybrid.kernels.ledger_torch import decide_torch
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.scalars import Scalars

Decide = Callable[[Scalars, float, float], None]
BACKENDS = pytest.mark.parametrize("decide", [decide, decide_torch], ids=["triton", "torch"])

ENTRIES = {
    "moved": (1.0, 1.0, 0.0), "stretch": (1.0, 5.0), "jump_square": (0.5,),
    "blocked": (0.0, 1.0, 2.0, 7.0), "norm_count": (0.0, 1.0, 2.0, 50.0),
    "norm_mean": (-69.0, -1.0, 0.0, 1.5), "norm_variance": (0.0, 0.04, 1.0),
    "loss": (math.nan, math.inf, -math.inf, 1.0, 2.0, 2.5, 9.0),
    "loss_previous": (math.nan, 2.0, -2.0, 0.0), "loss_count": (0.0, 1.0, 2.0, 30.0),
    "loss_mean": (0.0, -0.1, 0.3), "loss_variance": (0.0, 0.01, 1.0),
    "signal": (0.0, 0.25, 1.0), "horizon": (1.0, 0.875, 0.125),
    "rejections": (0.0, 1.0, 9.0, 10.0, 11.0, 40.0), "rejected": (0.0, 3.0),
    "accepted": (0.0, 3.0), "decision": (0.0, 1.0, 2.0), "hold": (0.0, 1.0),
    "found_inf": (0.0, 0.0, 1.0), "step_fraction": (1.0, 0.5), "cooldown": (0.0, 4.0),
    "cause_norm": (0.0, 2.0), "written": (0.0, 0.0, 1.0),
}  # fmt: skip
"""Any ledger; every decision has drawn values on both sides of its border."""
DECIDED = {
    "moved", "stretch", "jump_square", "blocked", "decision", "accepted", "rejections", "horizon",
    "step_fraction", "rejected", "cooldown", "hold", "loss", "cause_nonfinite", "cause_norm",
    "cause_loss", "written",
}  # fmt: skip


def test_a_fresh_ledger_knows_nothing() -> None:
    entries = read_ledger(new_ledger(DEVICE))
    ones = {name for name, value in entries.items() if value == 1}
    assert ones == {"horizon", "step_fraction", "loss_scale"}
    assert {name for name, value in entries.items() if value != value} == {"loss", "loss_previous"}


def decided(
    decide: Decide, entries: dict[str, float], sums: Tensor, prediction: Tensor, *limits: float
) -> tuple[Tensor, Tensor]:
    """Ledger and predictions after a decision, which was made in guarded memory."""
    arena = Arena()
    scalars = Scalars([TensorSet({"param": [torch.zeros(0, device=DEVICE)] * len(sums)})])
    scalars.ledger = arena.put(write_ledger(entries, DEVICE))
    scalars.sums, scalars.prediction = arena.put(sums.double()), arena.put(prediction)
    decide(scalars, *limits)
    arena.check()
    assert_same_bits(scalars.sums, sums.double(), "the sums")
    return scalars.ledger, scalars.prediction


@more(60)
@given(
    entries=st.fixed_dictionaries({n: st.sampled_from(v) for n, v in ENTRIES.items()}),
    size=st.sampled_from((1, 2, 5, 127, 128, 129, 300)),
    norm=st.sampled_from((0.0, 1.0, 4.0, 90.0, math.inf, math.nan, math.nan)),
    limits=st.tuples(st.sampled_from((0.5, 2.5, 8.0)), st.sampled_from((1.0, 10.0))),
    seed=st.integers(0, 999),
)
def test_deciding_is_its_torch_twin(
    entries: dict[str, float], size: int, norm: float, limits: tuple[float, float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(size, 3, generator=generator)
    sums[:, 1] = norm * norm / size
    sums[:, 2] = 0.0
    if math.isnan(norm):
        sums[:, 1] = 1.0
        sums[seed % size] = torch.tensor([math.nan, math.nan, 1.0])
    before = torch.randn(size, 6, generator=generator)
    before[:, 0] = before[:, 0].abs().clamp(0.1, 4.0)
    before[:, 3] = (before[:, 3] > -1.0).float()
    ledger, prediction = decided(decide, entries, sums, before, *limits)
    other_ledger, other_prediction = decided(decide_torch, entries, sums, before, *limits)
    assert_ledgers_near(ledger, other_ledger, rtol=1e-12)
    assert_near(prediction, other_prediction, "prediction", rtol=1e-6, atol=0)
    after, fractions = read_ledger(ledger), prediction[:, 2].cpu()
    for name in set(INDEX) - DECIDED:
        then = entries.get(name, 0.0)
        assert after[name] == then or math.isnan(then), name
    moved = before[:, 3] > 0
    if after["decision"]:
        assert (fractions[~moved] == 1).all(), "who took no part stays"
    if after["decision"] == 2:
        assert (fractions[moved] == 0).all()
    elif after["decision"] == 0:
        assert torch.equal(fractions, before[:, 2]), "nothing was decided"
    elif after["decision"] == 3:
        assert float(entries["written"]) == 1
        assert after["written"] == 0
        assert set(fractions.tolist()) <= {0.0, 1.0}
        kept = ("accepted", "rejected", "rejections", "horizon", "hold", "cooldown", "cause_norm")
        assert all(after[name] == entries[name] for name in kept), "nothing is learnt"
    else:
        assert rules.SMALLEST_FRACTION.value <= float(fractions.min())
        assert float(fractions.max()) <= rules.LARGEST_FRACTION.value
    if not entries["moved"]:
        assert after["decision"] == 0, "nothing moved, so there is nothing to decide on"


def ruled(
    decide: Decide,
    sums: Sequence[Sequence[float]] = ((0.0, 1.0, 0.0),),
    prediction: Sequence[Sequence[float]] = ((1.0, 0.0, math.nan),),
    **entries: Any,
) -> tuple[dict[str, float], Tensor]:
    """Decides on a move after ordinary steps: norm about 1, loss about 2."""
    start = {
        "moved": 1.0, "stretch": 2.0, "jump_square": 0.5, "norm_count": 20.0, "loss_count": 20.0,
        "norm_variance": 1e-3,
        "loss_previous": 2.0, "loss_variance": 0.01, "loss": math.nan, "horizon": 0.5,
    }  # fmt: skip
    measured = torch.tensor(sums, dtype=torch.float64)
    table = torch.tensor([[*row, 1.0, 0.0, 0.0] for row in prediction])
    ledger, cells = decided(decide, {**start, **entries}, measured, table, 3.0, 10.0)
    return read_ledger(ledger), cells[:, :3]


ORDINARY = [
    ({}, 1.0), ({"loss": 2.25}, 1.0), ({"loss": -50.0}, 1.0), ({"rejections": 3.0}, 1.0),
    # Spread and experience are respected.
    ({"loss": 9.0, "loss_count": 1.0}, 1.0), ({"norm_count": 1.0}, 1e6),
    ({"norm_variance": 1.0}, 15.0),
    ({"loss": 2.25, "loss_variance": 0.0, "loss_previous": 100.0}, 1.0),
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize(("entries", "norm"), ORDINARY, ids=str)
def test_an_ordinary_gradient_accepts(decide: Decide, entries: dict[str, Any], norm: float) -> None:
    after, cells = ruled(decide, [[0.0, norm**2, 0.0]], **entries)
    assert (after["decision"], after["accepted"], after["rejected"]) == (1, 1, 0)
    assert (after["moved"], after["stretch"], after["jump_square"]) == (0, 0, 0)
    assert (after["rejections"], after["hold"], after["cooldown"]) == (0, 0, 0)
    assert after["horizon"] == 0.5 * rules.HORIZON_GROWTH.value
    assert cells[0].tolist() == [1, 0, 1]


REJECTED = [
    ({"loss": 2.5}, 1.0, "loss"), ({"loss": math.inf}, 1.0, "loss"),
    ({"loss": -math.inf}, 1.0, "loss"),
    ({"loss": math.inf, "loss_count": 0.0, "loss_previous": math.nan}, 1.0, "loss"),
    ({}, 3.4, "norm"), ({}, math.inf, "norm"), ({"norm_variance": 1.0}, 25.0, "norm"),
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize(("entries", "norm", "cause"), REJECTED, ids=str)
def test_what_is_out_of_the_ordinary_rejects(
    decide: Decide, entries: dict[str, Any], norm: float, cause: str
) -> None:
    after, cells = ruled(decide, [[0.0, norm**2, 0.0]], **entries)
    causes = {name: after[name] for name in after if name.startswith("cause")}
    assert causes == {**dict.fromkeys(causes, 0), f"cause_{cause}": 1}
    assert (after["decision"], after["accepted"], after["rejected"]) == (2, 0, 1)
    assert (after["moved"], after["stretch"], after["jump_square"]) == (0, 0, 0)
    assert (after["rejections"], after["hold"], after["cooldown"]) == (1, 1, 10)
    assert after["horizon"] == 0.25
    assert math.isnan(after["loss"]), "of a point that was left again"
    assert cells[0].tolist() == [1, 0, 0]


@BACKENDS
@pytest.mark.parametrize(
    ("slope", "variance", "decision"), [(0.4, 0.0, 2), (0.3, 0.0, 1), (0.4, 0.01, 1)]
)
def test_a_gradient_clipped_outside_is_known_by_its_direction(
    decide: Decide, slope: float, variance: float, decision: int
) -> None:
    """Where something else fixes the norm, a gradient that points back along the move rejects."""
    sums = [[slope, 1.0, 0.0]]  # the move is √0.5 long: cosines of 0.57 and 0.42
    after, _ = ruled(decide, sums, norm_variance=variance)
    assert after["decision"] == decision


@BACKENDS
def test_one_nonfinite_gradient_is_the_scalers_two_are_the_points_fault(decide: Decide) -> None:
    bad = [[math.nan, math.inf, 1.0]]
    prediction = [[1.5, -2.0, math.nan]]
    limit = int(rules.BLOCKED_LIMIT.value)
    for blocked in range(limit - 1):
        after, cells = ruled(decide, bad, prediction, blocked=float(blocked))
        assert (after["decision"], after["blocked"], after["moved"]) == (0, blocked + 1, 1)
        assert (after["stretch"], after["jump_square"], after["hold"]) == (2, 0.5, 0)
        assert cells[0, :2].tolist() == [1.5, -2], "still away, with what is known of the move"
        assert cells[0, 2].isnan(), "and nothing was decided"
    after, cells = ruled(decide, bad, prediction, blocked=limit - 1.0)
    assert (after["decision"], after["blocked"], after["moved"]) == (2, 0, 0)
    assert (after["cause_nonfinite"], after["cause_norm"], after["cause_loss"]) == (1, 0, 0)
    assert cells[0].tolist() == [1.5, 0, 0]
    after, _ = ruled(decide, blocked=1.0)
    assert (after["decision"], after["blocked"]) == (1, 0), "a finite gradient clears the record"


@BACKENDS
def test_the_step_fraction_is_the_secant_rule(decide: Decide) -> None:
    """Slopes a before and b after: the minimum lies at a / (a - b)."""
    a_and_b = [(-1.0, 1.0), (-1.0, 3.0), (-3.0, -1.0), (-1.0, -0.9), (-1.0, 99.0), (-1.0, -2.0),
               (1.0, 2.0), (0.0, 1.0), (-1.0, 0.0005)]  # fmt: skip
    expected = [0.5, 0.25, 1.5, 2.0, 0.1, 1.0, 1.0, 1.0, 1.0]
    sums = [[b, 0.01, 0.0] for _, b in a_and_b]
    prediction = [[1.0, a, math.nan] for a, _ in a_and_b]
    after, cells = ruled(decide, sums, prediction, signal=1.0)
    assert cells[:, 2].tolist() == pytest.approx(expected)
    assert cells[:, 0].tolist() == pytest.approx([max(0.125, f) for f in expected])
    assert cells[:, 1].tolist() == [0] * len(expected)
    assert after["step_fraction"] == pytest.approx(sum(expected) / len(expected))
    # Noise makes single slopes worthless: the correction shrinks with the signal share,
    # and where half of the squared gradient is noise there is none.
    _, cells = ruled(decide, sums, prediction, signal=0.55)
    assert cells[:, 2].tolist() == pytest.approx([1 + 0.1 * (f - 1) for f in expected])
    for signal in (0.0, 0.1, 0.5):
        stretched = [[2.0, a, math.nan] for a, _ in a_and_b]
        _, cells = ruled(decide, sums, stretched, signal=signal)
        assert cells[:, 2].tolist() == [1.0] * len(expected)
        assert cells[:, 0].tolist() == pytest.approx([1.9] * len(expected))


@BACKENDS
def test_horizons_stay_in_their_range_and_are_kept_by_a_rejection(decide: Decide) -> None:
    sums, prediction = [[3.0, 0.01, 0.0], [-1.0, 0.01, 0.0]], [[0.2, -1.0, 1.0], [3.0, -3.0, 1.0]]
    after, cells = ruled(decide, sums, prediction, signal=1.0, horizon=0.9)
    assert cells[:, 0].tolist() == [rules.SMALLEST_SCALE.value, rules.LARGEST_SCALE.value]
    assert after["horizon"] == 1.0
    sums[0][1] = 1e6
    after, cells = ruled(decide, sums, prediction, signal=1.0)
    assert after["decision"] == 2
    assert cells[:, 0].tolist() == pytest.approx([0.2, 3.0])


def test_five_decisions_of_one_launch_each_give_the_same_bits() -> None:
    sums = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).abs().tolist()
    prediction = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)).tolist()
    quiet = [[a, b, 0.0] for a, b, _ in sums]
    with counted_launches() as log:
        runs = [ruled(decide, quiet, prediction, signal=1.0, norm_mean=3.0) for _ in range(5)]
    assert log == ["_decide_kernel"] * 5
    assert runs[0][0]["decision"] == 1
    for after, cells in runs[1:]:
        assert_same_bits(cells, runs[0][1], "prediction")
        assert str(after) == str(runs[0][0])
