"""FSDP1: ranks that hold pieces of flat parameters train as one process does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all, of_all, run_on_ranks
from test_sharded import BATCH, batches, make_net, make_optimizer, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from training import fast_config

from triton_hybrid import HybridOptimizer, Phase, reshard, split_param_groups

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.filterwarnings("ignore"),
]

KINDS: list[dict[str, Any]] = [
    {"config": {"predictor": "slow_ema"}},
    {"config": {"predictor": "slow_ema", "inline": False}},
    {"config": {"predictor": "slow_ema", "inline": False}, "orig": False},
    {"config": {"predictor": "slow_ema"}, "orig": False, "strategy": "SHARD_GRAD_OP"},
    {"config": {"predictor": "slow_ema", "inline": False}, "strategy": "SHARD_GRAD_OP"},
    {"config": {"predictor": "slow_ema"}, "strategy": "NO_SHARD"},
    {"config": {"predictor": "slow_ema"}, "orig": False, "strategy": "NO_SHARD"},
    {"config": {"predictor": "linear", "inline": False, "max_predict_steps": 4}, "quiet": True},
    {"config": {"predictor": "secant"}, "quiet": True, "dtype": torch.float64},
    {"config": {"predictor": "slow_ema"}, "base": "lion"},
    {"config": {"predictor": "slow_ema"}, "backend": "triton", "steps": 7},
]


def wrapped(
    net: nn.Module, orig: bool = True, strategy: str = "FULL_SHARD", group: Any = None
) -> nn.Module:
    """Every second layer by itself, the rest as a whole: pieces of all sizes, and none of some."""
    options: dict[str, Any] = {
        "use_orig_params": orig,
        "sharding_strategy": ShardingStrategy[strategy],
        "process_group": group,
        "device_id": torch.device("cpu"),  # else FSDP1 asks for a GPU
    }
    net[2] = FullyShardedDataParallel(net[2], **options)
    return FullyShardedDataParallel(net, **options)


def like_one_process(rank: int, world: int) -> list[Any]:
    groups = [dist.new_group([its]) for its in range(world)]
    results = []
    for kind in KINDS:
        runs = []
        for alone in (True, False) if rank == 0 else (False,):
            net, orig = make_net(kind.get("dtype", torch.float32)), kind.get("orig", True)
            if not alone:
                net = wrapped(net, orig, kind.get("strategy", "FULL_SHARD"))
            elif not orig:  # the same flat parameters, whole
                net = wrapped(net, orig, group=groups[0])
            optimizer = make_optimizer(
                net,
                kind.get("base", "adamw"),
                hybrid=fast_config(**kind["config"]),
                backend=kind.get("backend", "torch"),
                process_group=False if alone else None,
            )
            its = (0, 1) if alone else (rank, world)
            run = train(net, optimizer, kind.get("steps", 40), "quiet" not in kind, *its)
            runs.append({**run, "predicted": optimizer.stats().predicted_steps})
        results.append(runs)
    return results


SCENARIOS = [like_one_process]


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return run_on_ranks(2, SCENARIOS)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_losses_are_those_of_one_process(results: dict[str, list[Any]], number: int) -> None:
    everything = of_all(results, like_one_process)
    assert_same_on_all([ranks[number][-1] for ranks in everything])
    alone, together = everything[0][number]
    assert alone["phases"] == together["phases"]
    assert alone["predicted"] == together["predicted"] > 0
    worst = max(abs(a - b) / abs(a) for a, b in zip(alone["losses"], together["losses"]))
    assert worst < 1e-5
