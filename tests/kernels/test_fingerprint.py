"""Fingerprints: both backends agree, and every write shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import counted_launches
from kernel_memory import DEVICE, Arena, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import THREE, plain
from triton_hybrid.kernels.fingerprint import (
    PERIOD,
    find_writes,
    find_writes_torch,
    fingerprint,
    fingerprint_of,
    fingerprint_torch,
    note_weights,
    note_weights_torch,
)
from triton_hybrid.kernels.ledger import INDEX, PART_COLUMN
from triton_hybrid.kernels.multi_tensor import TensorSet


def found(tensors: TensorSet) -> list[tuple[float, float]]:
    """The fingerprints, after both backends agreed on them."""
    arena, both = Arena(), []
    for function in (fingerprint, fingerprint_torch):
        out = arena.carve((len(tensors), 2), torch.float32)
        function(tensors, out)
        arena.check()
        both.append([tuple(row) for row in out.tolist()])
    alone = [tuple(fingerprint_of(dense).tolist()) for dense in tensors.flat["param"]]
    assert both[0] == both[1] == alone
    return both[0]


@given(make=problems(groups=3), data=st.data())
def test_each_changed_element_shows(make: Make, data: st.DataObject) -> None:
    problem = make()
    before = found(problem.tensors)
    assert all(high > 0 for _, high in before)
    index = data.draw(st.integers(0, len(before) - 1), label="tensor")
    param = problem.tensors.flat["param"][index]
    if not len(param):
        return
    place = data.draw(st.integers(0, len(param) - 1), label="place")
    old = param[place].clone()
    param[place] = data.draw(st.sampled_from((0.0, -0.0, 1.5, float("inf"), float("nan"))))
    same = torch.equal(*(x.reshape(1).view(torch.uint8) for x in (old, param[place])))
    after = found(problem.tensors)
    assert (after[index] == before[index]) == same
    assert after[:index] + after[index + 1 :] == before[:index] + before[index + 1 :]
    param[place] = old
    assert found(problem.tensors) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_long_tensors_and_what_others_do_to_them(dtype: torch.dtype) -> None:
    values = torch.randn(PERIOD + 1000, dtype=torch.float64, device=DEVICE).to(dtype)
    state = values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    changes = (
        values, -values, values.flip(0), values.roll(1), values.roll(PERIOD), values.sort()[0],
        values.clamp(-2, 2), values * 0,
    )  # fmt: skip
    rows = {"param": list(changes), "weight": [state] * len(changes)}
    assert len(set(found(TensorSet(rows)))) == len(changes)


@given(make=problems(groups=3), every=st.booleans(), data=st.data())
def test_both_backends_note_and_find_the_same(make: Make, every: bool, data: st.DataObject) -> None:
    ours, theirs = make(), make()
    count = len(ours.specs)
    parts = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label="parts")
    index = data.draw(st.integers(0, count - 1), label="written")
    for problem in (ours, theirs):
        problem.scalars.prediction[:, PART_COLUMN.value] = torch.tensor(parts).float().to(DEVICE)
    for note, find, problem in (
        (note_weights, find_writes, ours),
        (note_weights_torch, find_writes_torch, theirs),
    ):
        note([problem.tensors], problem.scalars, every=every)
        find([problem.tensors], problem.scalars)
        assert problem.scalars.ledger[INDEX["written"]] == 0
        param = problem.tensors.flat["param"][index]
        param += 1
        find([problem.tensors], problem.scalars)
        seen = len(param) > 0 and (every or parts[index])
        assert problem.scalars.ledger[INDEX["written"]] == int(seen)
        assert not problem.scalars.found.any(), "zero between launches"
        problem.arena.check()
    assert_same_bits(ours.scalars.prediction, theirs.scalars.prediction, "predictions")


def test_one_launch_for_many_tensors() -> None:
    problem = Problem(plain((130,), (0,), (3, 3)), tiling=THREE)
    with counted_launches() as log:
        fingerprint(problem.tensors, torch.empty(3, 2, device=DEVICE))
    assert log == ["_fingerprint_kernel"]
