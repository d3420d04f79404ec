"""Ranks that hold parts of the parameters train as one process does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all, of_all, run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from training import fast_config

from triton_hybrid import HybridOptimizer, Phase, reshard, split_param_groups

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
BATCH = 16


SIZES, WIDE = (12, 9, 14, 3), (12, 9, 7, 3)
"""Bases of a tall matrix have no last columns of their own, and rounding turns those."""
FILTERS: tuple[int, ...] = ()
"""A convolution between two layers."""


def make_net(dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> nn.Module:
    """Layers whose parts are uneven on 2 and on 4 ranks, and empty on some; one is tall."""
    torch.manual_seed(0)
    if sizes == FILTERS:
        filters = nn.Conv1d(4, 6, 3, padding=1)
        ends = nn.Linear(12, 12), nn.Unflatten(1, (4, 3)), filters, nn.Flatten(), nn.Tanh()
        return nn.Sequential(*ends, nn.Linear(18, 3)).to(dtype)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv1d)):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def batches(noisy: bool) -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 12, generator=generator)
    while True:
        if noisy:
            x = torch.randn(BATCH, 12, generator=generator)
        yield x, (x[:, :3] * 2.0).sin()


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    noisy: bool,
    rank: int = 0,
    world: int = 1,
    source: Any = None,
) -> dict[str, list[Any]]:
    """Losses over the whole batch, of which every rank has its part, and phases."""
    losses, phases, source = [], [], source or batches(noisy)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for _ in range(steps):
        phases.append(optimizer.phase.value)
        if optimizer.needs_backward:
            x, target = next(source)
            dtype = next(model.parameters()).dtype
            wide = torch.promote_types(dtype, torch.float32)
            loss = (model(x[part].to(dtype)).to(wide) - target[part]).square().mean()
            loss.backward()
            optimizer.observe_loss(loss)
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    if world > 1:
        total = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(total)
        losses = (total / world).tolist()
    return {"losses": losses, "phases": phases}


def make_optimizer(model: nn.Module, base: str = "adamw", **options: Any) -> HybridOptimizer:
    groups: Any = model.parameters()
    if base == "muon":
        groups, base = split_param_groups(model, lr=1e-2), "adamw"
    return HybridOptimizer(groups, 1e-2, base=base, max_grad_norm=0.5, **options)


KINDS: list[dict[str, Any]] = [
    {"config": {"predictor": "slow_ema"}, "noisy": True},
    {"config": {"predictor": "slow_ema", "inline": False}, "noisy": True},
    {"config": {"predictor": "slow_ema"}, "noisy": True, "sizes": FILTERS},
    {"config": {"predictor": "linear", "inline": False, "max_predict_steps": 4}},
    # Quasi-Newton steps make much of little: in FP32 rounding moves them apart by 5e-5.
    {"config": {"predictor": "secant"}, "dtype": torch.float64, "sizes": WIDE},
    {"config": {"predictor": "none"}, "noisy": True},
    {"config": {"predictor": "slow_ema"}, "base": "muon", "noisy": True},
    {"config": {"predictor": "slow_ema"}, "base": "lion", "noisy": True},
    {"config": {"predictor": "slow_ema"}, "backend": "triton", "noisy": True, "steps": 7},
    {"config": {"predictor": "slow_ema"}, "backend": "triton", "base": "muon", "steps": 7},
    {"config": {"predictor": "secant"}, "backend": "triton", "dtype": torch.float64, "steps": 7},
]


def kinds(world: int) -> list[dict[str, Any]]:
    """The interpreter is slow: two ranks show what it does."""
    return [kind for kind in KINDS if world == 2 or "backend" not in kind]


def like_one_process(rank: int, world: int) -> list[Any]:
    results = []
    for kind in kinds(world):
        runs = []
        # One rank shows how one process trains.
        for ranks in (1, world) if rank == 0 else (world,):
            model = make_net(kind.get("dtype", torch.float32), kind.get("sizes", SIZES))
            if ranks > 1:
                model = sharded(model)
            optimizer = make_optimizer(
                model,
                kind.get("base", "adamw"),
                hybrid=fast_config(**kind["config"]),
                backend=kind.get("backend", "torch"),
                process_group=None if ranks > 1 else False,
            )
            its = (rank, world) if ranks > 1 else (0, 1)
            # Four ranks share two cores.
            steps = kind.get("steps", 40 if world == 2 else 20)
            run = train(model, optimizer, steps, kind.get("noisy", False), *its)
            run["predicted"] = optimizer.stats().predicted_steps
            runs.append(run)
        results.append(runs)
    return results


def on_other_meshes(rank: int, world: int) -> dict[str, Any]:
    """HSDP (replicas of parts); tensor parallel, with plain parameters after it; in FSDP2."""
    even = (12, 8, 8, 3)  # tensor parallel layers take no others
    runs: dict[str, Any] = {}
    for predictor in ("slow_ema", "linear"):
        options: dict[str, Any] = {"hybrid": fast_config(predictor=predictor)}
        model = make_net(sizes=even)
        optimizer = make_optimizer(model, process_group=False, **options)
        runs[f"alone {predictor}"] = train(model, optimizer, 25, noisy=True)
        if world == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
            model = sharded(make_net(sizes=even), mesh=mesh)
            optimizer = make_optimizer(model, **options)
            runs[f"hsdp {predictor}"] = train(model, optimizer, 25, True, rank, world)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        if world == 4:
            model = make_net(sizes=(12, 8, 3))
            optimizer = make_optimizer(model, process_group=False, **options)
            runs[f"alone in both {predictor}"] = train(model, optimizer, 25, noisy=True)
            both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            model = parallelize_module(make_net(sizes=(12, 8, 3)), both["tensor"], plan)
            fully_shard(model, mesh=both["data"])
            optimizer = make_optimizer(model, **options)
            run = train(model, optimizer, 25, True, rank // 2, 2)
            run["losses"] = [loss / 2 for loss in run["losses"]]  # a sum over four ranks
            runs[f"both {predictor}"] = run
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
        model = parallelize_module(make_net(sizes=even), mesh, plan)
        optimizer = make_optimizer(model, **options)
        runs[f"tensor parallel {predictor}"] = train(model, optimizer, 25, True)
    return runs


def verified(rank: int, world: int) -> dict[str, Any]:
    """Bits of the verified weights, masters and rollback on parts; what others write is obeyed."""
    results: dict[str, Any] = {"evaluations": []}
    for dtype in (torch.float32, torch.bfloat16):
        model = sharded(make_net(dtype))
        optimizer = make_optimizer(model, hybrid=fast_config(inline=False))
        x = next(batches(noisy=False))[0].to(dtype)

        def whole(model: nn.Module = model) -> list[Tensor]:
            return [p.full_tensor().detach().clone() for p in model.parameters()]

        before, checked = whole(), 0
        for _ in range(12):
            step = train(model, optimizer, 1, True, rank, world)
            if step["phases"] != ["predict"]:
                before = whole()
                continue
            predicted = whole()
            assert not all(map(torch.equal, before, predicted))
            with torch.no_grad():
                first = model(x)
                reshard(model)
                with optimizer.verified_weights():
                    assert all(map(torch.equal, before, whole()))
                    inside = model(x)
                    reshard(model)
                assert all(map(torch.equal, predicted, whole()))
                after = model(x)
                reshard(model)
            assert torch.equal(first, after)
            assert not torch.equal(first, inside)
            checked += 1
        assert checked
        for param in optimizer.param_groups[0]["params"]:
            entry = optimizer.state[param]
            rows = [key for key in entry if key not in ("step", "prediction", "move")]
            assert all(entry[key].placements == param.placements for key in rows)
            if dtype == torch.bfloat16:
                with optimizer.verified_weights():
                    held = entry["master"].to_local()
                    assert torch.equal(held.to(dtype), param.to_local())
        # One rank's part of one parameter is overwritten while a prediction stands.
        while optimizer.phase is not Phase.CORRECT:
            train(model, optimizer, 1, True, rank, world)
        if rank == 0:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].to_local().fill_(0.25)
        rollbacks = optimizer.stats().rollbacks
        train(model, optimizer, 1, True, rank, world)
        assert optimizer.phase is Phase.FULL
        assert optimizer.stats().rollbacks == rollbacks
        results[str(dtype)] = [whole(), optimizer.stats().state_bytes_device > 0]
    return results


def refused(rank: int, world: int) -> list[str]:
    model = sharded(make_net())
    messages = []
    for options in ({"process_group": False}, {"hybrid": fast_config(offload="cpu")}):
        optimizer = make_optimizer(model, **options)
        try:
            train(model, optimizer, 1, True, rank, world)
        except NotImplementedError as error:
            messages.append(str(error))
    odd = make_optimizer(model, hybrid=fast_config(inline=False))
    while odd.phase is not Phase.PREDICT:
        train(model, odd, 1, True, rank, world)
    if rank == 0:
        odd._progress.controller.in_row = 1
    try:
        odd.step()
    except RuntimeError as error:
        messages.append(str(error))
    return messages


SCENARIOS = [like_one_process, on_other_meshes, verified, refused]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    return run_on_ranks(request.param, SCENARIOS)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_losses_are_those_of_one_process(results: dict[str, list[Any]], number: int) -> None:
    everything = of_all(results, like_one_process)
    if number >= len(everything[0]):
        pytest.skip("two ranks show it")
    assert_same_on_all([ranks[number][-1] for ranks in everything])
    (alone, together), kind = everything[0][number], KINDS[number]
    assert alone["phases"] == together["phases"]
    assert alone["predicted"] == together["predicted"]
    assert alone["predicted"] > 0 or kind["config"]["predictor"] == "none"
    worst = max(abs(a - b) / abs(a) for a, b in zip(alone["losses"], together["losses"]))
    assert worst < 1e-5


@pytest.mark.parametrize("predictor", ["slow_ema", "linear"])
@pytest.mark.parametrize("kind", ["hsdp", "tensor parallel", "both"])
def test_losses_on_other_meshes(results: dict[str, list[Any]], kind: str, predictor: str) -> None:
    found = of_all(results, on_other_meshes)
    assert_same_on_all(found)
    if f"{kind} {predictor}" not in found[0]:
        pytest.skip("needs four ranks")
    one = "alone in both" if kind == "both" else "alone"
    alone, together = (found[0][f"{which} {predictor}"] for which in (one, kind))
    assert alone["phases"] == together["phases"]
    assert "correct" in alone["phases"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(alone["losses"], together["losses"]))
    assert worst < 1e-5


def test_verified_weights_of_parts(results: dict[str, list[Any]]) -> None:
    assert_same_on_all(of_all(results, verified))


def test_what_is_not_built_is_refused(results: dict[str, list[Any]]) -> None:
    for alone, offload, elsewhere in of_all(results, refused):
        assert "process_group" in alone
        assert "offload='cpu'" in offload
        assert "in_row 1" in elsewhere
        assert "in_row 0" in elsewhere
