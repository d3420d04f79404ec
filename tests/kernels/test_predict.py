"""The predicted move: who decides, what moves, and what is measured of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import (
    ALONG,
    BACKENDS,
    KERNELS,
    LEFT,
    LINEAR,
    ORTHOGONAL,
    PLAIN,
    SLOW_EMA,
    Checked,
)
from kernel_memory import DEVICE, assert_near, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import FP16, FP64, THREE, fewer, plain, some
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger import FACTOR_COLUMN, SLOPE_COLUMN, read_ledger


@pytest.mark.parametrize(
    ("rule", "along"),
    [
        ("adamw", SLOW_EMA),
        ("lion", SLOW_EMA),
        ("adamw", LINEAR),
        ("muon", LINEAR),
        ("adamw", ORTHOGONAL),
    ],
)
@given(
    data=st.data(),
    share=st.sampled_from((1.0, 0.25)),
    first=st.booleans(),
)
def test_both_backends_match_the_fp64_oracle(
    rule: str, along: Displacement, data: st.DataObject, share: float, first: bool
) -> None:
    make = data.draw(problems(rule, groups=3))
    problem, twin = make(), make()
    for actual in (problem, twin):
        actual.confident()
        factors = torch.linspace(0.2, 2.0, len(actual.specs), device=DEVICE)
        actual.prediction[:, FACTOR_COLUMN.value] = factors
    oracle, before = problem.promoted(), problem.snapshot()

    for actual, backend in ((problem, KERNELS), (twin, PLAIN), (oracle, PLAIN)):
        backend.predict(actual, along, share=share, first=first)

    left = (*LEFT, "param") if along.again else ("param",)
    for actual in (problem, twin):
        actual.assert_near(oracle, ["point"], rtol=2e-6, atol=2e-6)
        actual.assert_unchanged(before, but=("weight", *left, *actual.worked_out))
        columns = actual.sums[:, :2], oracle.sums[:, :2]
        scale = max(1e-6, float(columns[1].abs().max()))
        assert_near(*columns, "slope and squared displacement", rtol=1e-5, atol=1e-5 * scale)
        assert (actual.sums[:, 2] == 0).all()
        if along.again and actual.masters:
            for index, weight in enumerate(before["weight"]):
                assert_same_bits(actual.rows["weight"][index], weight, f"master[{index}]")
    if problem.precision != FP64:  # whose bias corrections differ in the last bit
        problem.assert_same(
            twin, rows=["point", "param", *(["residue"] * ("residue" in problem.rows))]
        )
    if share == 1.0:
        for index, weight in enumerate(before["weight"]):
            gone = oracle.rows["weight"][index] - weight.double()
            assert float(oracle.sums[index, 1]) == pytest.approx(float(gone.square().sum()))


@BACKENDS
@ALONG
@fewer(3)
@given(make=problems())
def test_without_slopes_the_move_is_the_same_and_exp_avg_is_not_read(
    backend: Checked, along: Displacement, make: Make
) -> None:
    whole, bare = make().confident(), make().confident()
    backend.predict(whole, along)
    for tensor in bare.tensors.flat["exp_avg"]:
        tensor.fill_(math.nan)
    backend.predict(bare, along, with_slopes=False)
    bare.assert_same(whole, rows=["weight", "param"])
    assert_same_bits(bare.sums[:, 1:], whole.sums[:, 1:], "sums")
    assert bool(bare.sums[:, 0].isnan().all()), "the poison of before stays"


@BACKENDS
def test_a_trajectory_steps_along_the_same_slopes_again(backend: Checked) -> None:
    """Why the second predicted step in a row need not measure them."""
    problem = Problem(some(), tiling=THREE).confident()
    slopes = []
    for number in range(3):
        backend.predict(problem, LINEAR, first=number == 0, share=0.3)
        slopes.append(problem.sums[:, 0].clone())
        assert_same_bits(slopes[number], slopes[0], "slopes")
        backend.check_move(problem)


CLOSED = (
    {"confidence": 0.25}, {"confidence": math.nan}, {"cooldown": 1.0}, {"nonfinite": 1.0},
    {"stretch": 2.0, "moved": 0.0}, {"losses": 400.0, "loss_noise": 1.0},
    {"losses": 450.0, "loss_noise": 0.1, "loss_early": 2.03, "loss_late": 2.0},
)  # fmt: skip
OPEN: tuple[dict[str, float], ...] = (
    {},
    {"confidence": 0.5},
    {"losses": 399.0, "loss_noise": 1.0},
    {"losses": 450.0},
    {"losses": 450.0, "loss_noise": 0.1, "loss_early": 2.04, "loss_late": 2.0},
    {"stretch": 1.0, "moved": 1.0, "confidence": 0.0, "cooldown": 3.0, "nonfinite": 1.0},
)


@BACKENDS
@pytest.mark.parametrize("entries", CLOSED, ids=str)
@ALONG
def test_behind_a_closed_gate_no_byte_changes(
    backend: Checked, entries: dict[str, float], along: Displacement
) -> None:
    shapes = plain((130,), (0,), (3, 3))
    problem = Problem(shapes, precision=FP16).confident(**entries)
    before, ledger = problem.snapshot(), problem.ledger.clone()
    backend.predict(problem, along)
    assert (problem.sums == 0).all(), "written, and zero"
    backend.check_move(problem, limit=0.0)
    problem.assert_unchanged(before)
    assert_same_bits(problem.ledger, ledger, "ledger")


@BACKENDS
@pytest.mark.parametrize("entries", OPEN, ids=str)
def test_an_open_gate_lets_the_weights_move(backend: Checked, entries: dict[str, float]) -> None:
    problem = Problem(plain((130,))).confident(**entries)
    before, ledger = problem.snapshot(), read_ledger(problem.ledger)
    backend.predict(problem)
    backend.check_move(problem)
    after = read_ledger(problem.ledger)
    assert not torch.equal(problem.rows["weight"][0], before["weight"][0])
    assert after["moved"] == 1
    assert after["stretch"] == ledger["stretch"] + 1
    changed = {name for name in after if after[name] != after[name] or after[name] != ledger[name]}
    assert changed <= {"moved", "stretch", "jump_square", "loss", "loss_previous"}


@BACKENDS
def test_a_tensor_without_any_step_yet_does_not_move(backend: Checked) -> None:
    shapes = [replace(spec, step=step) for spec, step in zip(plain((70,), (70,)), (0, 5))]
    problem = Problem(shapes).confident()
    for name in ("exp_avg", "exp_avg_sq", "slow_ema"):
        problem.rows[name][0].zero_()
    before = problem.snapshot()
    backend.predict(problem)
    backend.check_move(problem)
    assert_same_bits(problem.rows["weight"][0], before["weight"][0], "weight")
    assert (problem.sums[0] == 0).all()
    assert not torch.equal(problem.rows["weight"][1], before["weight"][1])


@BACKENDS
def test_a_stretch_adds_up(backend: Checked) -> None:
    """Distances add up as lengths, slopes as numbers; four quarters are the whole."""
    whole, parts = (Problem(plain((130,), (5, 7))).confident() for _ in "ab")
    start = whole.snapshot()["weight"]
    backend.predict(whole)
    backend.check_move(whole)
    for number in range(4):
        backend.predict(parts, share=0.25, first=number == 0)
        backend.check_move(parts)
    parts.assert_near(whole, ("weight",), rtol=1e-6, atol=1e-6)
    assert_near(parts.prediction, whole.prediction, "prediction", rtol=1e-5)
    assert read_ledger(parts.ledger)["stretch"] == 4
    one, four = (read_ledger(problem.ledger)["jump_square"] for problem in (whole, parts))
    assert four == pytest.approx(one, rel=1e-5)
    moved = [w - s for w, s in zip(whole.rows["weight"], start)]
    assert one == pytest.approx(float(sum(m.double().square().sum() for m in moved)), rel=1e-4)
    # One bias-corrected gradient mean times the displacement.
    slopes = [
        float((m.double() * d.double()).sum() / (1 - 0.9**spec.step))
        for m, d, spec in zip(whole.rows["exp_avg"], moved, whole.specs)
    ]
    assert whole.prediction[:, SLOPE_COLUMN.value].tolist() == pytest.approx(slopes, rel=1e-3)
