"""Checkpoints through torch.distributed.checkpoint's state dicts, nested and flattened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import assert_same_on_all, of_all, run_on_ranks
from test_sharded import batches, make_net, make_optimizer, sharded, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from training import assert_same_state, assert_same_weights, fast_config, state_copy, weights

from triton_hybrid import HybridOptimizer, Phase, split_param_groups

FOLDER = Path()


def make() -> tuple[nn.Module, HybridOptimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)]
    model = nn.Sequential(*layers)
    groups = split_param_groups(model, lr=1e-2)
    return model, HybridOptimizer(groups, loss_scale="dynamic", hybrid=fast_config(inline=False))


def step(model: nn.Module, optimizer: HybridOptimizer, seed: int) -> None:
    if optimizer.needs_backward:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
        optimizer.scale_loss(model(x).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stop", [3, 6, 7, 8, 9])
def test_goes_on_bit_for_bit(flat: bool, stop: int) -> None:
    model, optimizer = make()
    for index in range(stop):
        step(model, optimizer, index)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    twin, other = make()
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.phase is optimizer.phase
    assert other.param_groups[0]["blocks"] == optimizer.param_groups[0]["blocks"]
    for index in range(stop, stop + 20):
        step(model, optimizer, index)
        step(twin, other, index)
    assert_same_weights(weights(optimizer), weights(other))
    assert_same_state(state_copy(optimizer), state_copy(other))
    assert other.stats().predicted_steps == optimizer.stats().predicted_steps > 0


STOPS = {"slow_ema": (7, 8, 9), "linear": (20, 21, 22, 23)}
"""Steps before a run is saved: within its cycles, with and without a prediction in the weights."""
MORE = 15


def run_of(predictor: str, base: str, world: int) -> tuple[nn.Module, HybridOptimizer]:
    model = make_net()
    if world > 1:
        model = sharded(model)
    config = fast_config(predictor=predictor, inline=False, max_predict_steps=4)
    return model, make_optimizer(model, base, hybrid=config)


def source_at(gradients: int) -> Any:
    source = batches(noisy=True)
    for _ in range(gradients):
        next(source)
    return source


def runs() -> Iterator[tuple[str, str, int]]:
    for predictor, stops in STOPS.items():
        for stop in stops:
            yield predictor, "muon" if stop % 2 else "adamw", stop


def saving(rank: int, world: int) -> dict[str, Any]:
    """Saves runs in the middle of a cycle, and goes on with them."""
    results: dict[str, Any] = {}
    for index, (predictor, base, stop) in enumerate(runs()):
        model, optimizer = run_of(predictor, base, world)
        train(model, optimizer, stop, True, rank, world)
        weights, state = get_state_dict(model, optimizer)
        content = {"weights": weights, "optimizer": state}
        where = str(FOLDER / f"{predictor}-{stop}")
        if index % 2:
            dcp.async_save(content, checkpoint_id=where).result()
        else:
            dcp.save(content, checkpoint_id=where)
        gradients = optimizer.stats().gradient_evaluations
        phase = optimizer.phase.value
        rest = train(model, optimizer, MORE, True, rank, world, source_at(gradients))
        results[f"{predictor} {stop}"] = {"phase": phase, **rest}
    return results


def loading(rank: int, world: int) -> dict[str, Any]:
    """Goes on with them, on another number of ranks."""
    results: dict[str, Any] = {}
    for predictor, base, stop in runs():
        model, optimizer = run_of(predictor, base, world)
        load(model, optimizer, FOLDER / f"{predictor}-{stop}")
        gradients = optimizer.stats().gradient_evaluations
        phase = optimizer.phase.value
        rest = train(model, optimizer, MORE, True, rank, world, source_at(gradients))
        results[f"{predictor} {stop}"] = {"phase": phase, **rest}
    return results


WAYS = "as it stands", "at the verified weights", "written by others"
WHOLE_RUNS = [(predictor, way) for predictor in ("slow_ema", "linear") for way in WAYS]


def saving_whole(rank: int, world: int) -> dict[str, Any]:
    """Saves runs of one process while a prediction stands, and goes on with them."""
    results: dict[str, Any] = {}
    for predictor, way in WHOLE_RUNS:
        model, optimizer = run_of(predictor, "adamw", world)
        steps, source = 0, batches(noisy=True)
        while optimizer.phase is not Phase.CORRECT or steps < 12:
            train(model, optimizer, 1, True, rank, world, source)
            steps += 1
        if way == WAYS[2]:
            nn.init.constant_(model[0].weight, 0.25)
        with optimizer.verified_weights():
            verified = [param.detach().clone() for param in model.parameters()]
        with optimizer.verified_weights() if way == WAYS[1] else nullcontext():
            saved = get_state_dict(model, optimizer)
            dcp.save({"weights": saved[0], "optimizer": saved[1]}, checkpoint_id=FOLDER / way)
        rest = train(model, optimizer, MORE, True, rank, world, source)
        results[f"{predictor} {way}"] = {"verified": verified, **rest}
        os.rename(FOLDER / way, FOLDER / f"{predictor} {way}")
    return results


def loading_whole(rank: int, world: int) -> dict[str, Any]:
    """Goes on with them where every rank holds its parts."""
    results: dict[str, Any] = {}
    for predictor, way in WHOLE_RUNS:
        model, optimizer = run_of(predictor, "adamw", world)
        for _ in range(2):
            load(model, optimizer, FOLDER / f"{predictor} {way}")
        # Before its first step, on to others.
        options = StateDictOptions(full_state_dict=True)
        whole = get_state_dict(model, optimizer, options=options)
        plain, its = run_of(predictor, "adamw", 1)
        kinds = {"model_state_dict": whole[0], "optim_state_dict": whole[1]}
        set_state_dict(plain, its, options=options, **kinds)
        with its.verified_weights():
            found = [param.detach().clone() for param in plain.parameters()]
        parts = get_state_dict(model, optimizer)
        where = FOLDER / f"{predictor} {way} in parts"
        dcp.save({"weights": parts[0], "optimizer": parts[1]}, checkpoint_id=where)
        model, optimizer = run_of(predictor, "adamw", world)
        load(model, optimizer, where)
        source = source_at(optimizer.stats().gradient_evaluations)
        with optimizer.verified_weights():
            verified = [param.full_tensor().clone() for param in model.parameters()]
        rest = train(model, optimizer, MORE, True, rank, world, source)
        results[f"{predictor} {way}"] = {"verified": verified, "whole": found, **rest}
    return results


def load(model: nn.Module, optimizer: HybridOptimizer, where: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    content = {"weights": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=where)
    weights, state = content["weights"], content["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def in_memory(rank: int, world: int) -> list[Any]:
    """State dicts of the same ranks, whole or in parts, nested or flat: the same bits."""
    results = []
    # Torch cannot read what is both whole and flat, of its own AdamW neither.
    for whole, flat in ((False, False), (False, True), (True, False)):
        options = StateDictOptions(
            full_state_dict=whole, flatten_optimizer_state_dict=flat, broadcast_from_rank0=whole
        )
        model, optimizer = run_of("slow_ema", "muon", world)
        train(model, optimizer, 8, True, rank, world)
        saved = get_state_dict(model, optimizer, options=options)
        twin, other = run_of("slow_ema", "muon", world)
        set_state_dict(
            twin, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
        )
        assert other.phase is optimizer.phase
        runs = [train(*pair, 10, True, rank, world) for pair in ((model, optimizer), (twin, other))]
        ends = [[p.full_tensor() for p in each.parameters()] for each in (model, twin)]
        assert all(map(torch.equal, *ends))
        assert runs[0] == runs[1]
        results.append(runs[0])
    return results


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, list[Any]]]:
    global FOLDER  # the forked processes see it
    FOLDER = tmp_path_factory.mktemp("checkpoints")
    return {
        4: run_on_ranks(4, [saving]),
        2: run_on_ranks(2, [loading, in_memory]),
        1: run_on_ranks(1, [loading, saving_whole]),
        "parts": run_on_ranks(2, [loading_whole]),
    }


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", [f"{predictor} {stop}" for predictor, _, stop in runs()])
def test_a_run_goes_on_with_fewer_ranks(resumed: Any, name: str, world: int) -> None:
    before = of_all(resumed[4], saving)[0][name]
    after = of_all(resumed[world], loading)[0][name]
    assert after["phase"] == before["phase"]
    assert after["phases"] == before["phases"]
    worst = max(abs(a - b) / abs(a) for a, b in zip(before["losses"], after["losses"]))
    assert worst < 1e-5


@pytest.mark.parametrize(("predictor", "way"), WHOLE_RUNS)
def test_a_run_of_whole_parameters_goes_on_in_parts(resumed: Any, predictor: str, way: str) -> None:
    """What stands there is what stood; what others wrote, or put back, is no prediction."""
    before = of_all(resumed[1], saving_whole)[0][f"{predictor} {way}"]
    after = of_all(resumed["parts"], loading_whole)[0][f"{predictor} {way}"]
    assert_same_weights(before["verified"], after["verified"])
    assert_same_weights(before["verified"], after["whole"])
    if way != "at the verified weights":  # there the prediction does not return
        assert after["phases"] == before["phases"]
        worst = max(abs(a - b) / abs(a) for a, b in zip(before["losses"], after["losses"]))
        assert worst < 1e-5


def test_they_were_saved_in_the_middle_of_a_cycle(resumed: Any) -> None:
    found = of_all(resumed[4], saving)
    assert_same_on_all(found)
    assert {result["phase"] for result in found[0].values()} >= {"predict", "correct", "full"}


def test_state_dicts_in_memory(resumed: Any) -> None:
    assert_same_on_all(of_all(resumed[2], in_memory))
