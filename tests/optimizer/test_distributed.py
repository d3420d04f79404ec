"""Several ranks that hold the same parameters take every decision together."""

from __future__ import annotations

import copy
import datetime
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all, of_all, run_on_ranks
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import fast_config, make_model, state_copy, weights

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, needs_backward, split_param_groups

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
STEPS = 300


def everything(optimizer: HybridOptimizer) -> dict[str, Any]:
    """Weights, state, counters and ledger."""
    stats = optimizer.stats().to_dict()
    del stats["seconds_per_phase"]
    ledger = dict(zip(range(100), optimizer._engine.scalars.ledger.tolist()))
    return {
        "weights": weights(optimizer),
        "state": state_copy(optimizer),
        "stats": stats,
        "ledger": ledger,
    }


def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 12, generator=generator)
    return x, x[:, :5] + 0.3 * torch.randn(8, 5, generator=generator)


def _troubled(rank: int, world: int, inline: bool) -> dict[str, Any]:
    """Local losses, closures, silence, NaN and missing data on one rank, moves that go wrong."""
    model = DistributedDataParallel(make_model())
    config = fast_config(inline=inline)
    optimizer = HybridOptimizer(
        model.parameters(), 1e-2, hybrid=config, max_grad_norm=1.0, loss_scale="dynamic"
    )
    generator, phases = torch.Generator().manual_seed(rank), []
    for step in range(STEPS):
        phases.append(optimizer.phase.value)
        if not optimizer.needs_backward:
            optimizer.step()
            continue
        x, target = batch_of(generator)
        bad = step > 40 and step % 9 == 0 and rank == step % world
        unlucky, nothing = step % 37 == 36, step % 41 == 40
        its = rank == (step // 37) % world  # whose gradient is NaN, or missing
        # Where gradients are not reduced, one rank alone knows what is wrong with its own.
        with model.no_sync() if unlucky or nothing else nullcontext():

            def closure(x: Tensor = x, target: Tensor = target, bad: bool = bad) -> Tensor:
                loss = (model(x) - target).square().mean()
                optimizer.scale_loss(loss).backward()
                return loss * (100.0 if bad and optimizer.phase is Phase.CORRECT else 1.0)

            if step % 5 == 0 and not unlucky and not nothing:
                optimizer.step(closure)
                optimizer.zero_grad()
                continue
            if not (nothing and its):
                loss = closure()
                if rank == 0 or step % 3:  # a rank may stay silent
                    optimizer.observe_loss(loss)
        if unlucky and its:
            next(model.parameters()).grad[0, 0] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error" if not nothing else "ignore")
            optimizer.step()
        optimizer.zero_grad()
    return {**everything(optimizer), "phases": phases}


def troubled_inline(rank: int, world: int) -> dict[str, Any]:
    return _troubled(rank, world, inline=True)


def troubled_stepped(rank: int, world: int) -> dict[str, Any]:
    return _troubled(rank, world, inline=False)


def _over_ranks(rank: int, world: int, inline: bool) -> dict[str, Any]:
    """ZeroRedundancyOptimizer: every rank keeps the state of other parameters, and steps those.

    Beside it one optimizer of all parameters on the same gradients.
    """
    runs: dict[str, Any] = {}
    for predictor, steps in (
        ("slow_ema", STEPS),
        ("linear", 30),
        ("secant", 25),
    ):
        config = fast_config(inline=inline, predictor=predictor)
        options: dict[str, Any] = {"lr": 3e-3, "hybrid": config, "max_grad_norm": 0.5}
        for kind in ("zero", "whole"):
            dtype = torch.float64 if predictor == "secant" else torch.float32
            model = DistributedDataParallel(make_model(dtype))
            if kind == "zero":
                zero = ZeroRedundancyOptimizer(
                    model.parameters(), optimizer_class=HybridOptimizer, **options
                )
                outer, optimizer = zero, zero.optim
            else:
                outer = optimizer = HybridOptimizer(model.parameters(), **options)
            generator = torch.Generator().manual_seed(rank)
            phases, x_and_target = [], batch_of(generator)
            for step in range(steps):
                phases.append(optimizer.phase.value)
                if not needs_backward(outer):
                    outer.step()
                    continue
                x, target = batch_of(generator) if predictor == "slow_ema" else x_and_target
                x, target = x.to(dtype), target.to(dtype)

                def closure(
                    x: Tensor = x, target: Tensor = target, model: nn.Module = model
                ) -> Tensor:
                    loss = (model(x) - target).square().mean()
                    loss.backward()
                    return loss

                if step % 5 == 0:
                    outer.step(closure)
                else:
                    loss = closure()
                    if step % 37 == 36 and rank == 1:
                        next(p for g in optimizer.param_groups for p in g["params"]).grad.fill_(
                            torch.nan
                        )
                    optimizer.observe_loss(loss)
                    outer.step()
                outer.zero_grad()
            stats = optimizer.stats()
            runs[f"{predictor} {kind}"] = {
                "phases": phases,
                "weights": [p.detach().clone() for p in model.parameters()],
                "skipped": stats.skipped_nonfinite,
                "predicted": stats.predicted_steps,
            }
            if kind == "zero":
                assert len(optimizer.state) < len(list(model.parameters()))
    return runs


def zero_inline(rank: int, world: int) -> dict[str, Any]:
    return _over_ranks(rank, world, inline=True)


def zero_stepped(rank: int, world: int) -> dict[str, Any]:
    return _over_ranks(rank, world, inline=False)


def every_kind(rank: int, world: int) -> list[Any]:
    """Predictors, base rules, both backends; the first gradients are accumulated."""
    results = []
    kinds = [("linear", "adamw", "torch", 40), ("secant", "adamw", "torch", 40)]
    kinds += [
        ("auto", "muon", "torch", 40),
        ("slow_ema", "lion", "triton", 12),
    ]
    for predictor, base, backend, steps in kinds:
        plain = make_model()
        groups: Any = plain.parameters()
        if base == "muon":
            layers = [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)]
            torch.manual_seed(0)
            plain = nn.Sequential(*layers)
            groups = split_param_groups(plain, lr=1e-2)
        model = DistributedDataParallel(plain)
        config = fast_config(predictor=predictor)
        base = "adamw" if base == "muon" else base
        optimizer = HybridOptimizer(groups, 3e-3, base=base, hybrid=config, backend=backend)
        x, target = batch_of(torch.Generator().manual_seed(rank))
        for _ in range(steps):
            for context in (model.no_sync(), nullcontext()):
                with context:
                    loss = (model(x) - target).square().mean()
                    loss.backward()
                optimizer.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(optimizer))
    return results


def with_grad_scaler(rank: int, world: int) -> dict[str, Any]:
    """FP16 parameters, whose overflows are skipped by the step itself."""
    model = DistributedDataParallel(make_model(torch.float16))
    optimizer = HybridOptimizer(model.parameters(), 1e-2, hybrid=fast_config())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=20)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(60):
        x, target = (part.half() for part in batch_of(generator))
        loss = (model(x) - target).square().float().mean()
        scaler.scale(loss).backward()
        optimizer.observe_loss(loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {**everything(optimizer), "scale": scaler.get_scale()}


def disagreements(rank: int, world: int) -> list[tuple[str, bool]]:
    """What each rank is told of one that differs, and whether its weights stayed."""

    def step_of(optimizer: HybridOptimizer, model: nn.Module) -> None:
        model.zero_grad()
        x, target = batch_of(torch.Generator().manual_seed(7))
        (model(x) - target).square().mean().backward()
        optimizer.step()

    def run(differs: str, inline: bool = True) -> tuple[str, bool]:
        model, odd = make_model(), rank == world - 1
        full_steps = 7 if odd and differs == "settings" else 3
        config = fast_config(full_steps=full_steps, inline=inline)
        optimizer = HybridOptimizer(model.parameters(), 1e-2, hybrid=config)
        if differs != "settings":
            for _ in range(2):
                step_of(optimizer, model)
            saved = copy.deepcopy(optimizer.state_dict())
            for _ in range(2):
                step_of(optimizer, model)
            if odd and differs == "steps":
                optimizer.load_state_dict(saved)
            elif odd and differs == "rate":
                optimizer.param_groups[0]["lr"] = 2e-2
            elif odd and differs == "phase":
                # As if a decision had fallen otherwise here.
                optimizer._progress.controller.phase = Phase.WARMUP
        before = weights(optimizer)
        try:
            step_of(optimizer, model)
        except RuntimeError as error:
            return str(error), all(map(torch.equal, before, weights(optimizer)))
        return "", False

    return [run(differs) for differs in ("settings", "steps", "rate", "phase")]


def models_of_their_own(rank: int, world: int) -> dict[str, Any]:
    """Refused unless asked for; then nobody waits for anybody."""
    messages = []
    torch.manual_seed(rank)
    for predictor in ("auto", "none"):
        model = nn.Linear(12, 5)
        optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(predictor=predictor))
        before = weights(optimizer)
        model(torch.ones(1, 12)).sum().backward()
        try:
            optimizer.step()
        except NotImplementedError as error:
            messages.append(str(error))
        assert all(map(torch.equal, before, weights(optimizer)))
    alone = HybridOptimizer(model.parameters(), process_group=False, hybrid=fast_config())
    copies = [alone, pickle.loads(pickle.dumps(alone)), copy.deepcopy(alone)]
    for optimizer in copies:
        for _ in range(10 + rank):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()
    return {"messages": messages, "steps": [o.stats().gradient_evaluations for o in copies]}


def in_groups(rank: int, world: int) -> dict[str, Any]:
    """Halves of the ranks, each with data and decisions of its own."""
    size = world // 2
    halves = [dist.new_group(list(range(i * size, (i + 1) * size))) for i in range(2)]
    half, group = rank // size, halves[rank // size]
    model = DistributedDataParallel(make_model(), process_group=group)
    optimizer = HybridOptimizer(model.parameters(), 1e-2, hybrid=fast_config(), process_group=group)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(30 + 10 * half):
        x, target = batch_of(generator)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.observe_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
    return everything(optimizer)


def nobody_has_gradients(rank: int, world: int) -> dict[str, Any]:
    """As with AdamW, nothing happens; and a rank that comes without any at first waits too."""
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), 1e-2, hybrid=fast_config())
    before = weights(optimizer)
    optimizer.step()
    assert optimizer.stats().steps == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for param in model.parameters():
                param.grad = None if rank == 1 else torch.ones_like(param)
            optimizer.step()
    told = [w.filename for w in caught if "without any gradient" in str(w.message)]
    assert told == [__file__]
    assert all(map(torch.equal, before, weights(optimizer)))
    return everything(optimizer)


def left_alone(rank: int, world: int) -> list[Any]:
    """The last rank stops making steps: an error on the others within the group's patience."""
    group = dist.new_group(list(range(world)), timeout=datetime.timedelta(seconds=2))
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), hybrid=fast_config(), process_group=group)
    before = weights(optimizer)
    found = []
    if rank < world - 1:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except RuntimeError as error:
            found = [str(error), all(map(torch.equal, before, weights(optimizer)))]
    dist.barrier()
    return found


SCENARIOS = [
    troubled_inline, troubled_stepped, every_kind, with_grad_scaler, disagreements,
    models_of_their_own, in_groups, nobody_has_gradients, zero_inline, zero_stepped, left_alone,
]  # fmt: skip


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    few = (troubled_inline, troubled_stepped, disagreements, in_groups, zero_stepped, left_alone)
    return run_on_ranks(request.param, SCENARIOS if request.param == 2 else few)


def needed(results: dict[str, list[Any]], scenario: Any) -> list[Any]:
    if scenario.__name__ not in results:
        pytest.skip("two ranks show it")
    return of_all(results, scenario)


@pytest.mark.parametrize("scenario", [troubled_inline, troubled_stepped])
def test_replicas_keep_the_same_bits(results: dict[str, list[Any]], scenario: Any) -> None:
    found = needed(results, scenario)
    assert_same_on_all(found)
    stats = found[0]["stats"]
    assert stats["predicted_steps"] > 20
    assert stats["rollbacks"] > 0, "or it shows nothing"
    assert stats["skipped_nonfinite"] > STEPS // 40


def test_whatever_predicts_and_steps(results: dict[str, list[Any]]) -> None:
    found = needed(results, every_kind)
    assert_same_on_all(found)
    assert all(result["stats"]["predicted_steps"] > 0 for result in found[0])


def test_a_grad_scaler_skips_on_all(results: dict[str, list[Any]]) -> None:
    found = needed(results, with_grad_scaler)
    assert_same_on_all(found)
    assert found[0]["stats"]["skipped_nonfinite"] > 0
    assert found[0]["stats"]["predicted_steps"] > 0


def test_a_rank_that_differs_is_an_error_on_all(results: dict[str, list[Any]]) -> None:
    found = needed(results, disagreements)
    last = len(found) - 1
    for told in found:
        settings, steps, rate, phase = (message for message, _ in told)
        assert "full_steps=3" in settings
        assert "full_steps=7" in settings
        assert "step 4, phase full" in steps
        assert "step 2, phase full" in steps
        assert "0.01" in rate
        assert "0.02" in rate
        assert "phase full" in phase
        assert "phase warmup" in phase
        for message, stayed in told:
            assert f"rank {last}:" in message
            assert stayed


def test_models_of_their_own(results: dict[str, list[Any]]) -> None:
    for rank, found in enumerate(needed(results, models_of_their_own)):
        assert len(found["messages"]) == 2
        assert all("process_group=False" in message for message in found["messages"])
        assert found["steps"] == [10 + rank] * 3


@pytest.mark.parametrize("scenario", [zero_inline, zero_stepped])
@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])
def test_zero_redundancy_optimizer(
    results: dict[str, list[Any]], predictor: str, scenario: Any
) -> None:
    found = needed(results, scenario)
    zero = [ranks[f"{predictor} zero"] for ranks in found]
    assert_same_on_all(zero)
    assert zero[0]["predicted"] > 0
    if predictor == "slow_ema":
        assert zero[0]["skipped"] > 2
    whole = found[0][f"{predictor} whole"]
    assert whole["phases"] == zero[0]["phases"]
    for mine, its in zip(zero[0]["weights"], whole["weights"]):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5)


def test_a_group_decides_by_itself(results: dict[str, list[Any]]) -> None:
    found = needed(results, in_groups)
    size = len(found) // 2
    for half in (found[:size], found[size:]):
        assert_same_on_all(half)
    assert found[0]["stats"]["steps"] != found[-1]["stats"]["steps"]


def test_without_gradients(results: dict[str, list[Any]]) -> None:
    found = needed(results, nobody_has_gradients)
    assert_same_on_all(found)
    assert found[0]["stats"]["skipped_nonfinite"] == 2


def test_a_rank_that_stops_is_an_error_on_the_others(results: dict[str, list[Any]]) -> None:
    for found in needed(results, left_alone)[:-1]:
        message, stayed = found
        assert message
        assert stayed


def test_a_parameter_of_fsdp1_without_its_module_is_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True
    with pytest.raises(NotImplementedError, match="FSDP1"):
        HybridOptimizer([param])


@pytest.mark.parametrize("group", ["gloo", True, 0])
def test_what_is_no_process_group_is_refused(group: Any) -> None:
    with pytest.raises(ValueError, match=f"process_group={group!r}"):
        HybridOptimizer([nn.Parameter(torch.ones(3))], process_group=group)


def test_needs_backward_looks_through_wrappers() -> None:
    class Wrapper:
        def __init__(self, **inner: Any) -> None:
            self.__dict__.update(inner)

    config = HybridConfig(warmup_steps=0, full_steps=1, inline=False, confidence_threshold=0.0)
    param = nn.Parameter(torch.ones(3))
    optimizer = HybridOptimizer([param], hybrid=config)
    for _ in range(20):
        assert needs_backward(Wrapper(optim=Wrapper(optimizer=optimizer))) is (
            optimizer.needs_backward
        )
        if not optimizer.needs_backward:
            break
        param.grad = torch.ones(3)
        optimizer.step()
    assert not needs_backward(Wrapper(optim=optimizer))
