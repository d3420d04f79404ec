"""DTensors in loops as people write them: layers that thaw, losses in parts, quasi-Newton moves."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import of_all, run_on_ranks
from test_sharded import BATCH, batches, make_net, sharded, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from training import fast_config

from triton_hybrid import HybridOptimizer, Phase

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
SIZES = (12, 8, 3)
LAYOUTS = ("alone", "fsdp2", "tensor")


def laid_out(kind: str, world: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make_net(dtype, SIZES)
    if kind == "fsdp2":
        return sharded(model)
    if kind == "tensor":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def whole(model: nn.Module) -> list[Tensor]:
    params = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in params]


def freezing(rank: int, world: int) -> dict[str, Any]:
    """A layer that is frozen for five steps, then for good while a prediction stands."""
    found = {}
    for kind in LAYOUTS:
        model = laid_out(kind, world)
        first: Any = model[0]
        first.requires_grad_(False)
        optimizer = HybridOptimizer(
            model.parameters(),
            lr=1e-2,
            hybrid=fast_config(inline=False),
            process_group=False if kind == "alone" else None,
        )
        source, step, states = batches(noisy=True), 0, [whole(model)[0]]
        parts = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        part = parts if kind == "fsdp2" else slice(0, BATCH)
        while step < 40:
            step += 1
            if step == 5:
                first.requires_grad_(True)
            if step > 20 and optimizer.phase is Phase.CORRECT and first.weight.requires_grad:
                states.append(whole(model)[0])
                with optimizer.verified_weights():
                    states.append(whole(model)[0])
                first.requires_grad_(False)
            if optimizer.needs_backward:
                x, target = next(source)
                (model(x[part]) - target[part]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = [*states, *whole(model)]
    return found


def losses_in_parts(rank: int, world: int) -> list[float]:
    """Losses that are DTensors, by a closure, and observed before the first step, too."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "2": ColwiseParallel(use_local_output=False),
    }
    model = parallelize_module(make_net(sizes=(12, 8, 4)), mesh, plan)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
    source, heard = batches(noisy=True), []

    def closure() -> Tensor:
        x, target = next(source)
        optimizer.zero_grad()
        with loss_parallel():
            loss = nn.functional.cross_entropy(model(x), target.argmax(-1))
            loss.backward()
        return loss

    for index in range(10):
        if index % 2:
            optimizer.step(closure)
        else:
            optimizer.observe_loss(closure())
            optimizer.step()
        engine = optimizer._engine
        assert engine is not None
        heard.append(engine.read()["loss_previous"])
    assert optimizer.stats().predicted_steps > 0
    return heard


def solving(rank: int, world: int) -> dict[str, Any]:
    """``secant`` with weight decay, whose trust radius must not depend on who is in which batch."""
    found = {}
    for decay in (0.01, 0.1):
        for kind in LAYOUTS:
            model = laid_out(kind, world, torch.float64)
            optimizer = HybridOptimizer(
                model.parameters(),
                lr=1e-2,
                weight_decay=decay,
                hybrid=fast_config(predictor="secant"),
                process_group=False if kind == "alone" else None,
            )
            its = (rank, world) if kind == "fsdp2" else (0, 1)
            found[f"{kind} {decay}"] = train(model, optimizer, 20, False, *its)
    return found


def zero_checkpoints(rank: int, world: int) -> list[Any]:
    """What ZeroRedundancyOptimizer saves goes on bit for bit, wherever in a cycle it was saved."""
    found = []

    def make(predictor: str) -> tuple[nn.Module, Any]:
        model = DistributedDataParallel(make_net())
        config = fast_config(predictor=predictor, inline=False)
        options: dict[str, Any] = {"lr": 1e-2, "hybrid": config, "loss_scale": 8.0}
        return model, ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=HybridOptimizer, **options
        )

    def go_on(model: nn.Module, zero: Any, steps: int) -> Any:
        source = batches(noisy=True)
        for _ in range(steps):
            x, target = (piece.chunk(world)[rank] for piece in next(source))
            loss = (model(x) - target).square().mean()
            if zero.optim.needs_backward:
                zero.optim.scale_loss(loss).backward()
            zero.step()
            zero.zero_grad()
        return zero.optim.phase.value, zero.optim.stats().steps, whole(model)

    for predictor in ("slow_ema", "linear"):
        for stop in (5, 6, 7, 21):
            model, zero = make(predictor)
            go_on(model, zero, stop)
            phase, twins = zero.optim.phase.value, []
            for inside in (False, True):
                with zero.optim.verified_weights() if inside else nullcontext():
                    zero.consolidate_state_dict(to=0)
                    state = zero.state_dict() if rank == 0 else None
                    saved = copy.deepcopy([state, model.state_dict()])
                shown = [*saved[1].values()]
                dist.broadcast_object_list(saved)  # the model is rank 0's, as people save it
                twin, other = make(predictor)
                twin.load_state_dict(saved[1])
                other.load_state_dict(saved[0])
                twins.append((shown, twin, other))
            end = go_on(model, zero, 9)
            found += [(phase, shown, end, go_on(*pair, 9)) for shown, *pair in twins]
    return found


def zero_takes_over(rank: int, world: int) -> Any:
    """Training goes on from the checkpoint of a ZeroRedundancyOptimizer of AdamW."""
    model = DistributedDataParallel(make_net())
    kinds: list[Any] = [torch.optim.AdamW, HybridOptimizer]
    saved: list[Any] = [None]
    losses = []
    for kind in kinds:
        zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, lr=1e-2)
        if saved[0] is not None:
            zero.load_state_dict(saved[0])
        source = batches(noisy=False)
        for _ in range(5):
            x, target = (piece.chunk(world)[rank] for piece in next(source))
            loss = (model(x) - target).square().mean()
            loss.backward()
            zero.step()
            zero.zero_grad()
            losses.append(float(loss))
        zero.consolidate_state_dict(to=0)
        saved = [copy.deepcopy(zero.state_dict()) if rank == 0 else None]
        dist.broadcast_object_list(saved)
    steps = {float(its["step"]) for its in saved[0]["state"].values()}
    return losses, sorted(steps)


def clearing(rank: int, world: int) -> dict[str, Any]:
    """The state of one parameter is cleared while a prediction stands."""
    found = {}
    for kind in ("alone", "fsdp2"):
        model = laid_out(kind, world)
        config, group = fast_config(), False if kind == "alone" else None
        optimizer = HybridOptimizer(model.parameters(), 1e-2, hybrid=config, process_group=group)
        its = (rank, world) if kind == "fsdp2" else (0, 1)
        source = batches(noisy=True)
        while optimizer.phase is not Phase.CORRECT:
            train(model, optimizer, 1, True, *its, source)
        optimizer.state.pop(model[2].weight)
        found[kind] = train(model, optimizer, 20, True, *its, source)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return run_on_ranks(
        2, [freezing, losses_in_parts, solving, zero_checkpoints, zero_takes_over, clearing]
    )


@pytest.mark.parametrize("kind", LAYOUTS[1:])
def test_layers_thaw_and_freeze_as_in_one_process(results: Any, kind: str) -> None:
    for found in of_all(results, freezing):
        start, predicted, verified, end, *_ = found[kind]
        assert (verified - start).abs().max() > 1e-2, "it trains once it is thawed"
        assert not torch.equal(predicted, verified), "or it shows nothing"
        assert torch.equal(end, verified), "frozen, it goes back"
        for ours, its in zip(found[kind], found["alone"], strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-6)


def test_losses_in_parts_are_heard(results: Any) -> None:
    mine, theirs = of_all(results, losses_in_parts)
    assert mine == theirs
    assert all(0 < loss < 10 for loss in mine)


@pytest.mark.parametrize("kind", [f"{kind} {x}" for kind in LAYOUTS[1:] for x in (0.01, 0.1)])
def test_a_solver_with_weight_decay_is_that_of_one_process(results: Any, kind: str) -> None:
    for found in of_all(results, solving):
        its, ours = found[f"alone {kind.split()[1]}"], found[kind]
        assert ours["phases"] == its["phases"]
        assert ours["losses"] == pytest.approx(its["losses"], rel=1e-9)


def test_checkpoints_of_zero_go_on(results: Any) -> None:
    """Also those written at the verified weights, which are the same on all ranks."""
    mine, theirs = of_all(results, zero_checkpoints)
    assert {phase for phase, *_ in mine} >= {"full", "predict", "correct"}
    outside, inside = ([shown for _, shown, *_ in mine[first::2]] for first in (0, 1))
    assert sum(not all(map(torch.equal, *pair)) for pair in zip(outside, inside)) > 0
    for (_, here, its, ours), (_, there, *_) in zip(mine, theirs, strict=True):
        assert all(map(torch.equal, here, there))
        assert ours[:2] == its[:2]
        assert all(map(torch.equal, ours[2], its[2]))


def test_zero_takes_over_from_adamw(results: Any) -> None:
    for losses, steps in of_all(results, zero_takes_over):
        assert steps == [10.0]
        assert losses[-1] < losses[0]


def test_cleared_state_of_parts_is_noticed(results: Any) -> None:
    for found in of_all(results, clearing):
        assert found["fsdp2"]["phases"] == found["alone"]["phases"]
        assert found["fsdp2"]["losses"] == pytest.approx(found["alone"]["losses"], rel=1e-5)
