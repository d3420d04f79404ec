"""FSDP1: ranks that hold pieces of flat parameters train as one process does."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all, of_all, run_on_ranks
from test_sharded import (
    BATCH,
    FILTERS,
    SIZES,
    batches,
    make_net,
    make_optimizer,
    sharded,
    train,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffload,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
)
from training import fast_config

from triton_hybrid import HybridOptimizer, Phase, reshard, split_param_groups
from triton_hybrid.shards import local

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.filterwarnings("ignore"),
]

KINDS: list[dict[str, Any]] = [
    {"config": {"predictor": "slow_ema"}},
    {"config": {"predictor": "slow_ema", "inline": False}},
    {"config": {"predictor": "slow_ema"}, "sizes": FILTERS},
    {"config": {"predictor": "slow_ema", "inline": False}, "orig": False},
    {"config": {"predictor": "slow_ema"}, "orig": False, "strategy": "SHARD_GRAD_OP"},
    {"config": {"predictor": "slow_ema", "inline": False}, "strategy": "SHARD_GRAD_OP"},
    {"config": {"predictor": "slow_ema"}, "strategy": "NO_SHARD"},
    {"config": {"predictor": "slow_ema"}, "orig": False, "strategy": "NO_SHARD"},
    {"config": {"predictor": "linear", "inline": False, "max_predict_steps": 4}, "quiet": True},
    {"config": {"predictor": "secant"}, "quiet": True, "dtype": torch.float64},
    {"config": {"predictor": "slow_ema"}, "base": "lion"},
    {"config": {"predictor": "slow_ema"}, "base": "muon"},
    {"config": {"predictor": "slow_ema", "inline": False}, "base": "muon", "strategy": "NO_SHARD"},
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


@mock.patch("triton_hybrid.kernels.bases.LARGEST_SIDE", 0)  # the cut matrices have no bases
def like_one_process(rank: int, world: int) -> list[Any]:
    groups = [dist.new_group([its]) for its in range(world)]
    results = []
    for kind in KINDS:
        runs = []
        for alone in (True, False) if rank == 0 else (False,):
            net = make_net(kind.get("dtype", torch.float32), kind.get("sizes", SIZES))
            orig = kind.get("orig", True)
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


def whole_weights(net: nn.Module) -> list[Tensor]:
    with FullyShardedDataParallel.summon_full_params(net):
        return [param.detach().clone() for param in net.parameters()]


def troubled(rank: int, world: int) -> list[Any]:
    """A NaN in one rank's piece; a piece that somebody overwrites; evaluations in between."""
    results = []
    for orig in (True, False):
        net = wrapped(make_net(), orig)
        optimizer = make_optimizer(net, hybrid=fast_config(inline=False), loss_scale="dynamic")
        source, phases, skipped = batches(noisy=True), [], 0
        for step in range(40):
            phases.append(optimizer.phase.value)
            before = whole_weights(net)
            if optimizer.needs_backward:
                x, target = next(source)
                part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
                loss = (net(x[part]) - target[part]).square().mean()
                optimizer.scale_loss(loss).backward()
                optimizer.observe_loss(loss)
                pieces = [p for p in net.parameters() if p.grad is not None and p.numel()]
                if step % 7 == 6:
                    skipped += 1
                    if rank == 1:
                        pieces[0].grad[0] = torch.nan
            verified_before = optimizer.phase is Phase.PREDICT
            optimizer.step()
            optimizer.zero_grad()
            if verified_before:
                predicted = whole_weights(net)
                assert not all(map(torch.equal, before, predicted))
                with torch.no_grad():
                    first = net(x)
                    reshard(net)
                    with optimizer.verified_weights():
                        assert all(map(torch.equal, before, whole_weights(net)))
                        inside = net(x)
                        reshard(net)
                    assert torch.equal(net(x), first)
                    reshard(net)
                assert not torch.equal(inside, first)
        stats = optimizer.stats()
        assert stats.skipped_nonfinite > 0
        while optimizer.phase is not Phase.CORRECT:
            train(net, optimizer, 1, True, rank, world)
        rollbacks = optimizer.stats().rollbacks
        if rank == 0:
            with torch.no_grad():
                next(p for p in net.parameters() if p.numel()).fill_(0.25)
        train(net, optimizer, 1, True, rank, world)
        assert optimizer.phase is Phase.FULL
        assert optimizer.stats().rollbacks == rollbacks
        scale = float(optimizer.scale_loss(torch.ones(())))
        results.append([phases, whole_weights(net), stats.skipped_nonfinite, scale])
    return results


def nothing_here(rank: int, world: int) -> list[Any]:
    """A rank that holds padding alone takes the same steps."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1, bias=False)
    net = wrapped(nn.Sequential(nn.Identity(), nn.Identity(), net))
    optimizer = HybridOptimizer(net.parameters(), 1e-2, hybrid=fast_config(inline=False))
    losses = []
    for _ in range(30):
        if optimizer.needs_backward:
            loss = (net(torch.ones(4, 1)) - 3.0).square().mean()
            loss.backward()
            optimizer.observe_loss(loss)
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    assert (sum(p.numel() for p in net.parameters()) == 0) == (rank == 1)
    assert optimizer.stats().predicted_steps > 0
    return [losses, optimizer.phase.value, optimizer.stats().predicted_steps]


def source_at(gradients: int) -> Any:
    source = batches(noisy=True)
    for _ in range(gradients):
        next(source)
    return source


def through_fsdp(net: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    # On a CPU torch hands out the same memory for every row of state that it offloads.
    kept = FullStateDictConfig(), FullOptimStateDictConfig()
    for config in kept:
        config.offload_to_cpu = False
    FullyShardedDataParallel.set_state_dict_type(net, StateDictType.FULL_STATE_DICT, *kept)
    saved = FullyShardedDataParallel.optim_state_dict(net, optimizer)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(twin, other, saved))


def through_checkpoints(net: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    # Torch cannot read what is both flat and of flat parameters with nested state.
    flat = [{"flatten_optimizer_state_dict": True}] if net._use_orig_params else []
    for its in ({}, {"full_state_dict": True}, *flat):
        options = StateDictOptions(**its)
        weights, state = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        set_state_dict(
            twin, other, model_state_dict=weights, optim_state_dict=state, options=options
        )


def through_pieces(net: nn.Module, optimizer: Any, twin: nn.Module, other: Any) -> None:
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def resumed(rank: int, world: int) -> list[Any]:
    """In any phase of a cycle a run goes on with the same bits."""
    results = []
    ways = [through_fsdp, through_checkpoints, through_pieces]
    kinds = [(7, True, "adamw"), (8, True, "adamw"), (8, False, "adamw"), (9, True, "adamw")]
    for stop, orig, base in (*kinds, (9, False, "adamw"), (8, True, "muon")):
        for way in ways if stop == 8 else ways[:1]:
            runs = []
            for _ in range(2):
                net = wrapped(make_net(), orig)
                config = fast_config(inline=False, max_predict_steps=4)
                runs.append((net, make_optimizer(net, base, hybrid=config)))
            (net, optimizer), (twin, other) = runs
            train(net, optimizer, stop, True, rank, world)
            way(net, optimizer, twin, other)
            assert other.phase is optimizer.phase
            gradients = optimizer.stats().gradient_evaluations
            ends = [train(*run, 15, True, rank, world, source_at(gradients)) for run in runs]
            assert ends[0] == ends[1]
            assert all(map(torch.equal, whole_weights(net), whole_weights(twin)))
            results.append(ends[0])
    return results


def resumed_elsewhere(rank: int, world: int) -> list[Any]:
    """What was saved of pieces goes on in one process with whole parameters."""
    config = fast_config(inline=False, max_predict_steps=4)
    net = wrapped(make_net())
    optimizer = make_optimizer(net, hybrid=config)
    train(net, optimizer, 9, True, rank, world)
    options = StateDictOptions(full_state_dict=True)
    weights, state = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    plain = make_net()
    alone = make_optimizer(plain, hybrid=config, process_group=False)
    plain.load_state_dict(weights)
    alone.load_state_dict(state)
    assert alone.phase is optimizer.phase is Phase.CORRECT
    gradients = optimizer.stats().gradient_evaluations
    return [
        train(plain, alone, 15, True, source=source_at(gradients)),
        train(net, optimizer, 15, True, rank, world, source_at(gradients)),
    ]


def refused(rank: int, world: int) -> list[str]:
    messages = []
    net = wrapped(make_net())
    other = wrapped(make_net(), orig=False)
    flat = next(other.parameters())
    offloaded = FullyShardedDataParallel(
        make_net(),
        use_orig_params=True,
        cpu_offload=CPUOffload(offload_params=True),
        device_id=torch.device("cpu"),
    )
    alone = HybridOptimizer(net.parameters(), process_group=False)
    net(torch.ones(1, 12)).sum().backward()
    before = whole_weights(net)
    for attempt in (
        lambda: HybridOptimizer([flat], base="muon"),
        lambda: split_param_groups(other),
        lambda: HybridOptimizer(offloaded.parameters()),
        alone.step,
    ):
        with pytest.raises(NotImplementedError) as caught:
            attempt()
        messages.append(str(caught.value))
    assert all(map(torch.equal, before, whole_weights(net)))
    return messages


def in_hybrid(rank: int, world: int) -> list[Any]:
    """Replicas of pieces (HYBRID_SHARD), beside one process."""
    pairs = [dist.new_group(its) for its in ([0, 1], [2, 3], [0, 2], [1, 3])]
    groups = pairs[rank // 2], pairs[2 + rank % 2]
    runs = []
    for alone in (True, False):
        net = make_net() if alone else wrapped(make_net(), True, "HYBRID_SHARD", groups)
        optimizer = make_optimizer(
            net, hybrid=fast_config(), process_group=None if not alone else False
        )
        its = (0, 1) if alone else (rank, world)
        runs.append(train(net, optimizer, 25, True, *its))
        assert optimizer.stats().predicted_steps > 0
    return runs


def saved_at_verified_weights(rank: int, world: int) -> list[Any]:
    """Of parts the prediction does not return; a bad gradient then takes nothing back."""
    results = []
    for way in (sharded, wrapped):
        runs = []
        for _ in range(2):
            net = way(make_net())
            config = fast_config(inline=False, max_predict_steps=4)
            runs.append((net, make_optimizer(net, hybrid=config)))
        (net, optimizer), (twin, other) = runs
        while optimizer.phase is not Phase.CORRECT:
            train(net, optimizer, 1, True, rank, world)
        with optimizer.verified_weights():
            weights, state = copy.deepcopy(get_state_dict(net, optimizer))
        set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)
        with optimizer.verified_weights():
            before = parts_of(net)
        assert all(map(torch.equal, before, parts_of(twin)))
        assert not all(map(torch.equal, before, parts_of(net)))
        for run in runs:
            run[1].param_groups[0]["lr"] = 0.0  # what moves is taken back, nothing else
            train(*run, 1, True, rank, world, bad_source())
            run[1].param_groups[0]["lr"] = 1e-2
        assert all(map(torch.equal, before, parts_of(net)))
        assert all(map(torch.equal, before, parts_of(twin)))
        train(twin, other, 10, True, rank, world)
        results.append(other.stats().predicted_steps > optimizer.stats().predicted_steps)
    assert all(results)
    return results


def parts_of(net: nn.Module) -> list[Tensor]:
    return [local(param.detach()).clone() for param in net.parameters()]


def bad_source() -> Any:
    yield torch.ones(BATCH, 12), torch.full((BATCH, 3), 1e3)


SCENARIOS = [
    like_one_process, troubled, nothing_here, resumed, resumed_elsewhere, refused,
    saved_at_verified_weights,
]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return run_on_ranks(2, SCENARIOS)


def assert_alike(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert alone["phases"] == together["phases"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(alone["losses"], together["losses"]))
    assert worst < 1e-5


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_losses_are_those_of_one_process(results: dict[str, list[Any]], number: int) -> None:
    everything = of_all(results, like_one_process)
    assert_same_on_all([ranks[number][-1] for ranks in everything])
    alone, together = everything[0][number]
    assert_alike(alone, together)
    assert alone["predicted"] == together["predicted"] > 0


@pytest.mark.parametrize("scenario", [troubled, nothing_here, resumed, saved_at_verified_weights])
def test_all_ranks_decide_the_same(results: dict[str, list[Any]], scenario: Any) -> None:
    assert_same_on_all(of_all(results, scenario))


def test_a_run_of_pieces_goes_on_whole(results: dict[str, list[Any]]) -> None:
    for found in of_all(results, resumed_elsewhere):
        assert_alike(*found)


def test_replicas_of_pieces() -> None:
    found = of_all(run_on_ranks(4, [in_hybrid]), in_hybrid)
    assert_same_on_all(found)
    assert_alike(*found[0])


def test_what_is_not_built_is_refused(results: dict[str, list[Any]]) -> None:
    for flat, split, offloaded, alone in of_all(results, refused):
        for message in (flat, split):
            assert "base='muon' of parameter" in message
        assert "CPUOffload(offload_params=True)" in offloaded
        assert "lies on 2 ranks (FULL_SHARD), and 1 decide together" in alone
