"""Are the losses flat? What the ledger says of sequences whose course is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from kernel_launches import KERNELS, PLAIN, Checked
from kernel_problems import Problem
from kernel_specs import plain
from torch import Tensor
from triton_hybrid.kernels.ledger import LEAST_LOSSES, new_ledger, read_ledger
from triton_hybrid.kernels.ledger_torch import entries_of, is_flat_torch, observe_torch

LEAST = int(LEAST_LOSSES.value)


def verdicts(losses: Sequence[float]) -> list[bool]:
    """After each loss: is it flat by now?"""
    entries, found = entries_of(new_ledger(torch.device("cpu"))), list[bool]()
    for loss in losses:
        entries["loss"] = loss
        observe_torch(entries, 1.0, 1.0, (0.0,) * 4, 0.0, True, measured=False)
        found.append(bool(is_flat_torch(entries)))
    return found


def noise(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64)


def share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.parametrize("level", [0.0, -7.0, 1e6])
def test_noise_is_flat_but_for_one_time_in_twenty(level: float) -> None:
    runs = [verdicts((level + noise(800, seed)).tolist()) for seed in range(20)]
    assert not any(found[step] for found in runs for step in range(LEAST - 1))
    assert share([found[step] for found in runs for step in range(LEAST, 800)]) > 0.9


@pytest.mark.parametrize("fall", [1e-2, -1e-2], ids=["falls", "rises"])
def test_what_moves_by_a_hundredth_of_its_noise_is_not_flat(fall: float) -> None:
    steps = torch.arange(1000, dtype=torch.float64)
    runs = [verdicts((noise(1000, seed) - fall * steps).tolist()) for seed in range(10)]
    assert share([flat for found in runs for flat in found[LEAST:]]) < 0.02


@pytest.mark.parametrize("drop", [30.0, 300.0])
def test_a_floor_is_seen_soon_after_it_is_reached(drop: float) -> None:
    """Whatever fell before: it must not take ten times as long to forget."""
    course = torch.cat([torch.linspace(drop, 0.0, 500), torch.zeros(1300)]).double()
    runs = [verdicts((course + noise(1800, seed)).tolist()) for seed in range(10)]
    assert share([flat for found in runs for flat in found[LEAST:500]]) < 0.02
    assert share([flat for found in runs for flat in found[1500:]]) > 0.8


def test_another_level_ends_it_and_so_does_a_new_fall() -> None:
    level = torch.cat([torch.zeros(600), torch.full((60,), 8.0), torch.linspace(8.0, 0.0, 200)])
    found = verdicts((level.double() + noise(860)).tolist())
    assert share(found[LEAST:600]) > 0.9
    assert share(found[605:660]) == 0.0
    assert share(found[-60:]) == 0.0


@pytest.mark.parametrize("losses", [[3.0] * 600, [0.0] * 600, [math.nan] * 600])
def test_where_nothing_is_known_of_the_noise_nothing_is_flat(losses: list[float]) -> None:
    assert not any(verdicts(losses))


def test_training_without_noise_is_not_flat_while_it_falls() -> None:
    assert not any(verdicts([2.0 + 0.997**step for step in range(1500)]))


def test_losses_that_are_missing_or_infinite_do_not_count() -> None:
    some = noise(500).tolist()
    assert any(verdicts(some))
    gaps = [x for loss in some for x in (loss, math.nan, math.inf, -math.inf)]
    assert verdicts(gaps)[::4] == verdicts(some)


def test_each_loss_has_the_weight_that_the_test_is_made_for() -> None:
    """The k-th of n: k^(q - 1), here by rising factorials; and half the squared changes."""
    entries = entries_of(new_ledger(torch.device("cpu")))
    losses = (noise(60, 3) / 100 + 5).tolist()
    for loss in losses:
        entries["loss"] = loss
        observe_torch(entries, 1.0, 1.0, (0.0,) * 4, 0.0, True, measured=False)
    for name, q in (("loss_early", 4), ("loss_late", 10)):
        weights = [math.prod(range(k, k + q - 1)) for k in range(1, 61)]
        mean = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
        assert entries[name] == pytest.approx(mean, rel=1e-12), name
    assert entries["losses"] == 60
    assert entries["loss_noise"] == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("backend", [KERNELS, PLAIN], ids=["triton", "torch"])
def test_both_backends_follow_the_losses(backend: Checked) -> None:
    """Some of them limited, cut, or missing: against the entries of plain numbers."""
    losses = [40.0, 9.0, math.nan, 8.5, 8.4, 70.0, 8.3, math.inf, 8.2, 8.25, 8.1]
    problem, expected = Problem(plain((70,))), entries_of(new_ledger(torch.device("cpu")))
    for loss in losses:
        problem.note(loss=loss)
        backend.step(problem, slow_beta=0.6)
        expected["loss"] = loss
        observe_torch(expected, 1.0, 1.0, (0.0,) * 4, 0.0, True, measured=False)
    found = read_ledger(problem.ledger)
    for name in ("losses", "loss_early", "loss_late", "loss_noise", "loss_previous"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
