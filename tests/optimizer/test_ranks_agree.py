"""Several ranks take the same decisions, and obey who writes, where only one of them knows more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all, of_all, run_on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import fast_config

from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer, Phase

WRITTEN = 0.25
NEAR = 0.03
"""More than the few steps after a write move a weight."""


def net_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    first, hidden, last = sizes
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


def batch(width: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(seed))
    return x, (2 * x[:, :1]).sin()


def step(net: nn.Module, optimizer: Any, seed: int = 1, loss: float | None = None) -> None:
    """A step on the same batch everywhere; tells another loss, if one is given."""
    if optimizer.needs_backward:
        x, y = batch(6, seed)
        value = (net(x) - y).square().mean()
        value.backward()
        optimizer.observe_loss(value.detach() if loss is None else loss)
    optimizer.step()
    optimizer.zero_grad()


def auto_sees_a_nan(rank: int, world: int) -> list[Any]:
    """A gradient that is not finite on one rank, in a step that `auto` compares with the last."""
    net = DistributedDataParallel(net_of(6, 12, 3))
    config = HybridConfig(warmup_steps=4, full_steps=3)
    optimizer = HybridOptimizer(net.parameters(), lr=3e-3, hybrid=config)
    x, _ = batch(6, rank)
    told = []
    for number in range(40):
        odd = number == 3
        with net.no_sync() if odd else nullcontext():
            loss = (net(x) - (2 * x[:, :3]).sin()).square().mean()
            loss.backward()
        optimizer.observe_loss(loss.detach())
        if odd and rank == 1:
            next(net.parameters()).grad[0, 0] = math.nan
        optimizer.step()
        optimizer.zero_grad()
        stats = optimizer.stats()
        told.append([optimizer.phase.value, stats.predictor, stats.reason])
    assert stats.predictor == "secant"
    assert stats.skipped_nonfinite == 1
    return [told, [param.detach() for param in net.parameters()]]


def one_rank_writes(rank: int, world: int) -> list[Any]:
    """A write to one parameter, on one rank alone, before a Predict step: the others agree."""
    others = []
    for predictor in ("slow_ema", "linear", "secant"):
        net = net_of(6, 8, 4)
        config = fast_config(predictor=predictor, inline=False, max_predict_steps=2)
        optimizer = HybridOptimizer(net.parameters(), lr=2e-3, hybrid=config)
        stretches = 0
        while stretches < 3:
            stretches += optimizer.phase is Phase.PREDICT
            if stretches < 3:
                step(net, optimizer)
        if rank == 0:
            with torch.no_grad():
                net[0].bias.add_(0.01)
        while not optimizer.needs_backward:
            step(net, optimizer)
        x, y = batch(6, 1)
        (net(x) - y).square().mean().backward()
        for param in net.parameters():  # one gradient for all, as of DistributedDataParallel
            dist.all_reduce(param.grad, op=dist.ReduceOp.SUM)
            param.grad /= world
        optimizer.step()
        others += [optimizer.phase.value]
        others += [param.detach() for name, param in net.named_parameters() if name != "0.bias"]
    return others


def _warmed_up(net: nn.Module, optimizer: Any, forward: Callable[[int], Tensor]) -> int:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    before = [param.detach().clone() for param in net.parameters()]
    for number in range(6):
        forward(number).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return sum(not torch.equal(old, new) for old, new in zip(before, net.parameters()))


def rates_begin_at_0(rank: int, world: int) -> list[int]:
    """A rank has no gradient of its own in the first step, whose learning rate is 0."""
    config = fast_config(predictor="slow_ema")
    ones = torch.ones(4, 8) * (rank + 1)
    body = net_of(8, 8, 2)
    body[0].requires_grad_(False)
    wrapped = FullyShardedDataParallel(body, use_orig_params=True, device_id=torch.device("cpu"))
    head = [param for param in wrapped.parameters() if param.requires_grad]
    optimizer = HybridOptimizer(head, lr=1e-2, hybrid=config)
    moved = [_warmed_up(wrapped, optimizer, lambda number: wrapped(ones + number))]

    both = nn.ModuleDict({"first": nn.Linear(8, 8), "late": nn.Linear(8, 3)})
    both.forward = lambda x, late: both["late"](both["first"](x)) if late else both["first"](x)
    replica = DistributedDataParallel(both, find_unused_parameters=True)
    zero = ZeroRedundancyOptimizer(
        replica.parameters(), optimizer_class=HybridOptimizer, lr=1e-2, hybrid=config
    )
    moved.append(_warmed_up(both, zero, lambda number: replica(ones + number, number > 0)))
    return moved


def _sharded(last: int, **options: Any) -> tuple[nn.Module, HybridOptimizer]:
    net = net_of(6, 8, last)
    for layer in (net[0], net[2], net):
        fully_shard(layer)
    config = fast_config(**options)
    return net, HybridOptimizer(net.parameters(), lr=5e-3, hybrid=config)


def _in_mid_stretch(last: int, predictor: str) -> tuple[Any, ...]:
    """A run before a verdict, and another that has not begun."""
    net, optimizer = _sharded(last, predictor=predictor)
    while optimizer.phase is not Phase.CORRECT:
        step(net, optimizer)
    return net, optimizer, *_sharded(last, predictor=predictor)


def _resumed(
    net: nn.Module, optimizer: HybridOptimizer, twin: nn.Module, other: HybridOptimizer
) -> None:
    weights, state = copy.deepcopy(get_state_dict(net, optimizer))
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)


def fewer_rows_than_ranks(rank: int, world: int) -> list[bool]:
    """A rank that has nothing of a parameter goes on in mid-stretch, as it was or verified."""
    results = []
    for predictor in ("slow_ema", "linear", "secant"):
        net, optimizer, twin, other = _in_mid_stretch(1, predictor)
        _resumed(net, optimizer, twin, other)
        with optimizer.verified_weights(), other.verified_weights():
            results.append(_alike(net, twin))
        for _ in range(3):
            step(net, optimizer)
            step(twin, other)
            results.append(optimizer.phase is other.phase and _alike(net, twin))
    return results


def _alike(net: nn.Module, twin: nn.Module) -> bool:
    pairs = zip(net.parameters(), twin.parameters())
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


def writes_before_saving(rank: int, world: int) -> list[float]:
    """What is written before a checkpoint is made stands when the prediction is rejected."""
    found = []
    for predictor in ("slow_ema", "linear", "secant"):
        net, optimizer, twin, other = _in_mid_stretch(4, predictor)
        with torch.no_grad():
            for param in net.parameters():
                param.fill_(WRITTEN)
        _resumed(net, optimizer, twin, other)
        for its in ((net, optimizer), (twin, other)):
            step(*its, loss=math.inf)
        wholes = [param.full_tensor() for param in twin.parameters()]
        found.append(max(float((whole - WRITTEN).abs().max()) for whole in wholes))
        assert _alike(net, twin)
        assert optimizer.phase is other.phase
    return found


def _of_rank(keeper: int, made: Any) -> Any:
    """State as a checkpoint of files has it: of what is no part, one rank's copy."""
    if isinstance(made, dict):
        return {key: _of_rank(keeper, value) for key, value in made.items()}
    if hasattr(made, "placements"):
        return made
    said = [made]
    dist.broadcast_object_list(said, src=keeper)
    return said[0]


def one_rank_writes_before_saving(rank: int, world: int) -> list[float]:
    """What one rank alone wrote to its parts stands, whoever's numbers the checkpoint has."""
    found = []
    for predictor in ("slow_ema", "linear", "secant"):
        for keeper in range(world):
            net, optimizer, twin, other = _in_mid_stretch(4, predictor)
            parts = [param.to_local() for param in net.parameters()]
            if rank == 0:
                for part in parts:
                    part.detach().fill_(WRITTEN)
            held, state = copy.deepcopy(get_state_dict(net, optimizer))
            state = _of_rank(keeper, state)
            set_state_dict(twin, other, model_state_dict=held, optim_state_dict=state)
            step(twin, other, loss=math.inf)
            its = [param.to_local().detach() for param in twin.parameters()]
            found += [float((part - WRITTEN).abs().max()) for part in its if part.numel()]
    return found if rank == 0 else []


def one_rank_has_nothing(rank: int, world: int) -> list[bool]:
    """A checkpoint at the verified weights, where one rank holds no element that was moved."""

    def made() -> tuple[nn.Module, HybridOptimizer]:
        torch.manual_seed(0)
        net = nn.Linear(6, 1)
        fully_shard(net)
        return net, HybridOptimizer(net.parameters(), lr=5e-3, hybrid=fast_config())

    same = []
    for keeper in range(world):
        (net, optimizer), (twin, other) = made(), made()
        while optimizer.phase is not Phase.CORRECT:
            step(net, optimizer)
        with optimizer.verified_weights():
            held, state = copy.deepcopy(get_state_dict(net, optimizer))
            state = _of_rank(keeper, state)
            set_state_dict(twin, other, model_state_dict=held, optim_state_dict=state)
            with other.verified_weights():
                same.append(_alike(net, twin))
    return same


def split_masters(rank: int, world: int) -> list[bool]:
    """A run goes on from a full state dict, and from one of parts, of 16 bits beside BF16."""

    def made() -> tuple[nn.Module, HybridOptimizer]:
        net = net_of(6, 8, 4).bfloat16()
        fully_shard(net)
        options: dict[str, Any] = {"hybrid": fast_config(), "master_weights": "split"}
        return net, HybridOptimizer(net.parameters(), lr=5e-3, **options)

    same = []
    for full in (True, False):
        (net, optimizer), (twin, other) = made(), made()
        while optimizer.phase is not Phase.CORRECT:
            _step_bf16(net, optimizer)
        options = StateDictOptions(full_state_dict=full)
        held, state = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        set_state_dict(twin, other, model_state_dict=held, optim_state_dict=state, options=options)
        for _ in range(6):
            _step_bf16(net, optimizer)
            _step_bf16(twin, other)
            same.append(_alike(net, twin))
    return same


def _step_bf16(net: nn.Module, optimizer: HybridOptimizer) -> None:
    x, y = batch(6, 1)
    (net(x.bfloat16()).float() - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def uneven_windows(rank: int, world: int) -> str:
    """Micro-batches of which one rank has fewer, once, before their gradients are summed."""
    net = DistributedDataParallel(net_of(6, 8, 4))
    windows = AccumulationConfig(maximum=4, minimum=4)
    optimizer = HybridOptimizer(net.parameters(), hybrid=fast_config(), accumulation=windows)
    for window in range(4):
        count = 1 if window == 2 and rank == 1 else 4
        for number in range(count):
            with nullcontext() if number == count - 1 else net.no_sync():
                x, y = batch(6, 10 * window + number)
                (net(x) - y).square().mean().backward()
            assert optimizer.window_complete is (number == 3)
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{window}: {error}"
        optimizer.zero_grad()
    return "no error"


SCENARIOS: Sequence[Any] = (
    auto_sees_a_nan, one_rank_writes, rates_begin_at_0, fewer_rows_than_ranks,
    writes_before_saving, one_rank_writes_before_saving, one_rank_has_nothing, split_masters,
    uneven_windows,
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return run_on_ranks(2, SCENARIOS)


@pytest.mark.parametrize("scenario", [auto_sees_a_nan, one_rank_writes])
def test_all_ranks_decide_the_same(results: dict[str, list[Any]], scenario: Any) -> None:
    assert_same_on_all(of_all(results, scenario))


def test_rates_that_begin_at_0(results: dict[str, list[Any]]) -> None:
    found = of_all(results, rates_begin_at_0)
    assert sum(moved for moved, _ in found) > 0
    assert {moved for _, moved in found} == {4}


def test_a_rank_with_nothing_of_a_parameter_goes_on(results: dict[str, list[Any]]) -> None:
    assert all(map(all, of_all(results, fewer_rows_than_ranks)))


def test_writes_before_a_checkpoint_of_parts_stand(results: dict[str, list[Any]]) -> None:
    assert max(map(max, of_all(results, writes_before_saving))) < NEAR


def test_what_one_rank_wrote_before_a_checkpoint_stands(results: dict[str, list[Any]]) -> None:
    found, _ = of_all(results, one_rank_writes_before_saving)
    assert len(found) == 24
    assert max(found) < NEAR


def test_a_checkpoint_at_verified_weights_is_the_same_of_all_ranks(
    results: dict[str, list[Any]],
) -> None:
    assert all(map(all, of_all(results, one_rank_has_nothing)))


def test_full_state_dicts_of_split_masters(results: dict[str, list[Any]]) -> None:
    assert all(map(all, of_all(results, split_masters)))


def test_windows_of_other_lengths_are_an_error_on_all_ranks(results: dict[str, list[Any]]) -> None:
    """A gradient was divided, and a rate chosen, by what each rank had counted."""
    for said in results[uneven_windows.__name__]:
        assert said.startswith("2: the ranks disagree")
        assert "micro-batches 4" in said
        assert "micro-batches 1" in said
