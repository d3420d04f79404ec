"""Checkpoints: what is refused and why, what other optimizers go on from, and their size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import (
    assert_same_state,
    assert_same_weights,
    backward,
    fast_config,
    feed,
    make_batches,
    make_model,
    state_copy,
    train,
    weights,
)

from triton_hybrid import HybridConfig, HybridOptimizer, Phase
from triton_hybrid.checkpoint import PROGRESS, VERSION
from triton_hybrid.exchange import torch_state_dict

SHAPES = {"first.weight": (4, 3), "first.bias": (4,), "second.weight": (4, 3)}


def named(shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def made(shapes: dict[str, tuple[int, ...]] = SHAPES, names: bool = True) -> HybridOptimizer:
    params = named(shapes)
    optimizer = HybridOptimizer(params if names else [p for _, p in params], hybrid=fast_config())
    feed(optimizer, 6)
    return optimizer


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "fewer": (
        dict(list(SHAPES.items())[:2]),
        "2 parameters, must be 3 .* parameter 2 is None, must be second.weight",
    ),
    "renamed": (
        {"first.weight": (4, 3), "first.bias": (4,), "third.weight": (4, 3)},
        "parameter 2 is third.weight, must be second.weight",
    ),
    "reordered": (
        {"second.weight": (4, 3), "first.bias": (4,), "first.weight": (4, 3)},
        "parameter 0 is second.weight, must be first.weight; parameter 2 is first.weight",
    ),
    "wider": (
        {"first.weight": (5, 3), "first.bias": (5,), "second.weight": (4, 3)},
        r"'exp_avg' of parameter 0 \(first.weight\) has shape \(5, 3\), must be \(4, 3\) .*"
        r"parameter 1 \(first.bias\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused_with_what_differs(other: str) -> None:
    shapes, message = OTHERS[other]
    optimizer, source = made(), made(shapes)
    before = state_copy(optimizer), weights(optimizer)
    with pytest.raises(ValueError, match=f"of another model.*{message}"):
        optimizer.load_state_dict(source.state_dict())
    assert_same_state(state_copy(optimizer), before[0])
    assert_same_weights(weights(optimizer), before[1])


def test_without_names_the_counts_and_shapes_tell() -> None:
    optimizer = made(names=False)
    with pytest.raises(ValueError, match="group 0 has 2 parameters, must be 3"):
        optimizer.load_state_dict(made(OTHERS["fewer"][0], names=False).state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(5, 3\)"):
        optimizer.load_state_dict(made(OTHERS["wider"][0]).state_dict())
    optimizer.load_state_dict(made(OTHERS["renamed"][0]).state_dict())
    groups = [{"params": [param]} for _, param in named()]
    with pytest.raises(ValueError, match="different number of parameter groups: 3, must be 1"):
        optimizer.load_state_dict(HybridOptimizer(groups).state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_give_are_the_same_model(prefix: str) -> None:
    optimizer = made()
    source = made({f"{prefix}{name}": shape for name, shape in SHAPES.items()})
    optimizer.load_state_dict(source.state_dict())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_later_version_is_refused() -> None:
    optimizer = made()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0][PROGRESS]["version"] == VERSION
    saved["param_groups"][0][PROGRESS]["version"] = VERSION + 1
    with pytest.raises(ValueError, match=f"version={VERSION + 1}: must be at most {VERSION}"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("plain", [True, False], ids=["as it is", "torch_state_dict"])
def test_adamw_goes_on_from_ours(plain: bool) -> None:
    """Also from the state dict as it is: AdamW keeps what it does not know, and reads the rest."""
    model = make_model()
    optimizer = HybridOptimizer(model.named_parameters(), lr=1e-2, hybrid=fast_config())
    train(model, optimizer, 12)
    optimizer.eval()  # a prediction is not AdamW's to judge
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.named_parameters(), lr=0.5)
    saved = optimizer.state_dict() if plain else torch_state_dict(optimizer)
    adamw.load_state_dict(copy.deepcopy(saved))
    if not plain:
        fresh = torch.optim.AdamW(twin.named_parameters())
        backward(twin, next(make_batches()))
        fresh.step()
        assert fresh.state_dict()["state"][0].keys() == saved["state"][0].keys()
        assert saved["param_groups"][0].keys() <= fresh.state_dict()["param_groups"][0].keys()
        twin.load_state_dict(model.state_dict())
    base = HybridOptimizer(model.named_parameters(), lr=0.5, hybrid=HybridConfig(predictor="none"))
    base.load_state_dict(copy.deepcopy(torch_state_dict(optimizer)))
    batches, theirs = make_batches(5), make_batches(5)
    for _ in range(5):
        for its, other, stream in ((model, base, batches), (twin, adamw, theirs)):
            other.zero_grad()
            backward(its, next(stream))
            other.step()
    assert adamw.param_groups[0]["lr"] == 1e-2
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-6)


def test_muon_goes_on_from_ours() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = HybridConfig(predictor="none")
    options: dict[str, Any] = {"weight_decay": 0.1, "adjust_lr_fn": "original"}
    params = [nn.Parameter(torch.eye(4, 3) + index) for index in range(2)]
    optimizer = HybridOptimizer(
        params, 1e-2, base="muon", hybrid=config, ns_dtype="bfloat16", **options
    )
    feed(optimizer, 5)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    muon = torch.optim.Muon(twins, lr=0.5)
    muon.load_state_dict(copy.deepcopy(torch_state_dict(optimizer)))
    for other in (optimizer, muon):
        feed(other, 3, seed=9)
    for a, b in zip(params, twins):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_torch_has_not_is_refused() -> None:
    matrices = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    mixed = HybridOptimizer([{"params": matrices[:1], "base": "muon"}, {"params": matrices[1:]}])
    with pytest.raises(ValueError, match=r"base=\"all of \['adamw', 'muon'\]\""):
        torch_state_dict(mixed)
    with pytest.raises(ValueError, match="base='lion'"):
        torch_state_dict(HybridOptimizer(matrices, base="lion"))
    with pytest.raises(ValueError, match=r"blocks=\(2, 1\)"):
        torch_state_dict(HybridOptimizer(matrices, base="muon", blocks=(2, 1)))


@pytest.mark.parametrize("predictor", ["auto", "slow_ema", "linear", "none"])
def test_a_file_is_as_large_as_the_state(predictor: str, tmp_path: Path) -> None:
    params = [nn.Parameter(torch.ones(200, 100)) for _ in range(4)]
    optimizer = HybridOptimizer(params, hybrid=fast_config(predictor=predictor))
    feed(optimizer, 8)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    size = (tmp_path / "state.pt").stat().st_size
    state = optimizer.stats().state_bytes_device
    assert state <= size <= state + 20_000


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("predictor", ["slow_ema", "linear", "secant"])
def test_a_checkpoint_of_a_predict_phase_goes_on_without_predictions(
    predictor: str, middle: bool
) -> None:
    config = fast_config(predictor=predictor, inline=False, correction_interval=2)
    model, batches = make_model(), make_batches()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    while optimizer.phase is not Phase.PREDICT:
        train(model, optimizer, 1, batches)
    verified = weights(optimizer)
    if middle:
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = make_model(seed=3)
    plain = HybridConfig(predictor="none", inline=False)
    restored = HybridOptimizer(other.parameters(), lr=1e-2, hybrid=plain)
    other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    assert restored.needs_backward
    train(other, restored, 1, batches)
    for param, values in zip(other.parameters(), verified, strict=True):
        assert (param.detach() - values).abs().max() < 3e-2  # a step of AdamW from either point
    assert Phase.PREDICT not in train(other, restored, 12, batches)
