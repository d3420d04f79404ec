"""Adaptive accumulation on several ranks: one decision, whoever reduces when."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import of_all, run_on_ranks
from test_fsdp1 import wrapped
from test_sharded import make_net, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
RANKS = 2
SIZE, WINDOWS, NOISE = 50_000, 60, 100.0  # the noise scale is of a micro-batch of one rank


class Linear(nn.Module):
    """Its gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, gradient: Tensor) -> Tensor:
        return self.weight @ gradient


def _train(rank: int, world: int) -> list[tuple[list[int], Tensor, float, int]]:
    results = []
    for reduces_once in (True, False):
        model: Any = DistributedDataParallel(Linear())
        optimizer = HybridOptimizer(
            model.parameters(),
            1e-3,
            hybrid=HybridConfig(predictor="none"),
            accumulation=AccumulationConfig(4, minimum=2),
        )
        generator = torch.Generator().manual_seed(rank)
        lengths = []
        for _ in range(WINDOWS):
            for count in range(1, 5):  # noqa: B007
                last = optimizer.last_of_window
                draw = torch.randn(SIZE, generator=generator) * math.sqrt(NOISE)
                with model.no_sync() if reduces_once and not last else nullcontext():
                    model(1.0 + draw).backward()
                if optimizer.window_complete:
                    break
            lengths.append(count)
            optimizer.step()
            optimizer.zero_grad()
        stats = optimizer.stats()
        weight = model.module.weight.detach().clone()
        results.append((lengths, weight, stats.noise_scale, stats.micro_batches))
    return results


def _one_has_no_data(rank: int, world: int) -> tuple[Tensor, Tensor, float]:
    """The last step finds gradients on the first rank alone."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(5))
    optimizer = HybridOptimizer(
        [param],
        hybrid=HybridConfig(predictor="none"),
        accumulation=AccumulationConfig(2, minimum=2),
        loss_scale=8.0,
    )
    for step in range(3):
        before = param.detach().clone()
        for _ in range(2 if step < 2 or rank == 0 else 0):
            optimizer.scale_loss(param.square().sum()).backward()
            assert optimizer.window_complete is (optimizer._binding.windows.count == 2)
        optimizer.step()
        optimizer.zero_grad()
    return before, param.detach().clone(), optimizer.stats().loss_scale


def _padding_alone(rank: int, world: int) -> tuple[list[int], int, float | None]:
    """FSDP1 leaves the second rank nothing but padding, and it counts with the first."""
    model = wrapped(nn.Sequential(*(nn.Identity(), nn.Identity()), nn.Linear(1, 1, bias=False)))
    optimizer = HybridOptimizer(
        model.parameters(),
        hybrid=HybridConfig(predictor="none"),
        accumulation=AccumulationConfig(4, minimum=2),
    )
    assert (sum(p.numel() for p in model.parameters()) == 0) == (rank == 1)
    generator, lengths = torch.Generator().manual_seed(0), []
    for _ in range(8):
        for count in range(1, 5):  # noqa: B007
            model(torch.randn(4, 1, generator=generator)).sum().backward()
            if optimizer.window_complete:
                break
        lengths.append(count)
        optimizer.step()
        optimizer.zero_grad()
    return lengths, optimizer.stats().micro_batches, optimizer.stats().noise_scale


def _like_one_process(rank: int, world: int) -> dict[str, Any]:
    """Lengths of windows, noise, and losses before and after, however the parameters lie."""
    ways: dict[str, Any] = {
        "alone": lambda net: net,
        "ddp": DistributedDataParallel,
        "zero": DistributedDataParallel,
        "fsdp2": sharded,
        "fsdp1": wrapped,
        "fsdp1 flat": lambda net: wrapped(net, orig=False),
        "tensor": lambda net: parallelize_module(net, mesh, plan),
    }
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    found = {}
    for kind, way in ways.items():
        # All ranks of a tensor parallel model see the same batch, as one process does.
        parted = kind not in ("alone", "tensor")
        model = way(make_net(sizes=(12, 8, 14, 3)))
        options: dict[str, Any] = {
            "lr": 1e-2,
            "hybrid": HybridConfig(predictor="none"),
            "accumulation": AccumulationConfig(4, minimum=2),
        }
        if kind == "zero":
            outer: Any = ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=HybridOptimizer, **options
            )
        else:
            alone = False if kind == "alone" else None
            outer = HybridOptimizer(model.parameters(), process_group=alone, **options)
        optimizer = outer.optim if kind == "zero" else outer
        generator = torch.Generator().manual_seed(0)
        lengths, losses = [], []
        for _ in range(12):
            for count in range(1, 5):  # noqa: B007
                x = torch.randn(16, 12, generator=generator)
                x = x.chunk(world)[rank] if parted else x
                loss = (model(x) - x[:, :3].sin()).square().mean()
                loss.backward()
                total = loss.detach().clone()
                if parted:
                    dist.all_reduce(total)
                losses.append(float(total) / (world if parted else 1))
                if optimizer.window_complete:
                    break
            lengths.append(count)
            outer.step()
            outer.zero_grad()
        found[kind] = (lengths, optimizer.stats().noise_scale, losses)
    return found


def _not_reduced(rank: int, world: int) -> list[str]:
    """What is said where gradients stay whole, or elsewhere, until the last micro-batch."""
    told = []
    for way in (wrapped, sharded):
        model = way(make_net())
        optimizer = HybridOptimizer(model.parameters(), accumulation=AccumulationConfig(2))
        if way is sharded:
            model.set_requires_gradient_sync(False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                for _ in range(3):
                    with model.no_sync() if way is wrapped else nullcontext():
                        model(torch.ones(2, 12)).sum().backward()
                    assert not optimizer.window_complete
            except RuntimeError as error:
                told.append(str(error))
        told += [str(w.message) for w in caught if "window_complete" in str(w.message)]
    return told


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    scenarios = [_train, _one_has_no_data, _padding_alone, _like_one_process, _not_reduced]
    return run_on_ranks(RANKS, scenarios)


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp2", "fsdp1", "fsdp1 flat", "tensor"])
def test_windows_and_noise_are_those_of_one_process(
    results: dict[str, list[Any]], kind: str
) -> None:
    for found in of_all(results, _like_one_process):
        (lengths, noise, losses), (its, its_noise, its_losses) = found["alone"], found[kind]
        assert its == lengths
        assert len(set(lengths)) > 1, "or it shows nothing"
        assert its_noise == pytest.approx(noise, rel=1e-5)
        assert its_losses == pytest.approx(losses, rel=1e-5)


def test_gradients_that_are_not_reduced(results: dict[str, list[Any]]) -> None:
    for whole, elsewhere in of_all(results, _not_reduced):
        assert "no_sync() of FSDP1" in whole
        assert "set_requires_gradient_sync" in elsewhere


def test_a_rank_without_data_is_no_error_and_nobody_steps(results: dict[str, list[Any]]) -> None:
    for before, after, loss_scale in of_all(results, _one_has_no_data):
        assert torch.equal(before, after)
        assert loss_scale == 8.0


def test_a_rank_that_holds_padding_alone_counts_with_the_others(
    results: dict[str, list[Any]],
) -> None:
    (lengths, count, noise), theirs = of_all(results, _padding_alone)
    assert theirs == (lengths, count, noise)
    assert noise is not None
    assert count == sum(lengths)


def test_ranks_choose_the_same_windows(results: dict[str, list[Any]]) -> None:
    mine, theirs = of_all(results, _train)
    for (lengths, weight, noise, count), (others, their_weight, their_noise, _) in zip(
        mine, theirs
    ):
        assert lengths == others
        assert torch.equal(weight, their_weight)
        assert noise == their_noise
        assert count == sum(lengths)
        assert len(set(lengths)) > 1, "or it shows nothing"
        # A micro-batch of all ranks together has less noise.
        assert noise == pytest.approx(NOISE / RANKS, rel=0.3)
