"""Several ranks: what they agree on, and what is refused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import fast_config, make_model

from triton_hybrid import HybridOptimizer, Phase

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
RANKS = 2


def _as_rank(rank: int, folder: str, scenario: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.save(scenario(rank), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_ranks(scenario: Callable[[int], Any]) -> list[Any]:
    """What a scenario returns on each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_as_rank, (folder, scenario), nprocs=RANKS)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def _train(model: nn.Module, optimizer: HybridOptimizer, rank: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for step in range(steps):
        x = torch.randn(8, 12, generator=generator)
        target = torch.randn(8, 5, generator=generator)
        if optimizer.needs_backward:
            loss = (model(x) - target).square().mean()
            loss.backward()
            if rank == 0 or step % 3:  # a rank may stay silent
                # One rank alone sees a move go wrong.
                bad = rank == 0 and optimizer.phase is Phase.CORRECT and step > 40
                optimizer.observe_loss(loss * (100.0 if bad else 1.0))
        optimizer.step()
        optimizer.zero_grad()


def _data_parallel(rank: int) -> list[tuple[list[Tensor], dict[str, Any]]]:
    results = []
    for inline in (True, False):
        model = DistributedDataParallel(make_model())
        optimizer = HybridOptimizer(
            model.parameters(), 1e-2, hybrid=fast_config(inline=inline, predictor="slow_ema")
        )
        _train(model, optimizer, rank, 60)
        stats = optimizer.stats().to_dict()
        del stats["seconds_per_phase"]
        results.append(([p.detach().clone() for p in model.parameters()], stats))
    return results


def test_ranks_take_the_same_decisions_on_different_losses() -> None:
    for (weights, stats), (others, their_stats) in zip(*on_ranks(_data_parallel), strict=True):
        assert stats == their_stats
        assert stats["predicted_steps"] > 5
        assert stats["rollbacks"] > 0, "or it shows nothing"
        for mine, theirs in zip(weights, others, strict=True):
            assert torch.equal(mine, theirs)


def _refusals(rank: int) -> list[str]:
    messages = []
    torch.manual_seed(rank)  # shards, or models of their own
    for predictor in ("auto", "none"):
        model = nn.Linear(12, 5)
        optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(predictor=predictor))
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(1, 12)).sum().backward()
        try:
            optimizer.step()
        except NotImplementedError as error:
            messages.append(str(error))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    optimizer = HybridOptimizer(model.parameters(), process_group=alone, hybrid=fast_config())
    for _ in range(20 + rank):  # nobody waits for anybody
        optimizer.step()
    return messages


def test_shards_are_refused_and_models_of_their_own_have_a_way() -> None:
    for messages in on_ranks(_refusals):
        assert len(messages) == 2
        assert all("process_group" in message for message in messages)


def test_a_parameter_of_fsdp1_is_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True
    with pytest.raises(NotImplementedError, match="FSDP1"):
        HybridOptimizer([param])


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(ValueError, match="process_group='gloo'"):
        HybridOptimizer([nn.Parameter(torch.ones(3))], process_group="gloo")
