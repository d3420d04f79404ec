"""Muon groups: everything that holds for AdamW groups holds for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    assert_same_weights,
    fast_config,
    make_deep_model,
    train,
    weights,
)
from triton_hybrid.kernels.newton_schulz import QUINTIC
from triton_hybrid.kernels.newton_schulz_torch import newton_schulz_torch

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups

OFF = HybridConfig(predictor="none")
PREDICTORS = ("auto", "slow_ema", "linear", "none")
MIXING = ("auto", "slow_ema")
"""Those with which the slow EMA takes part in the momentum."""


def make_optimizer(model: nn.Module, **options: Any) -> HybridOptimizer:
    defaults: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "hybrid": fast_config()}
    return HybridOptimizer(split_param_groups(model), **{**defaults, **options})


def matrices(shapes: tuple[tuple[int, int], ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def random_gradients(*lists: list[nn.Parameter], steps: int) -> Iterator[int]:
    """The same random gradients for parameters of equal shapes."""
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        for group in zip(*lists):
            grad = torch.randn(group[0].shape, generator=generator)
            for param in group:
                param.grad = grad.clone()
        yield step


# ---------------------------------------------------------------------- torch.optim.Muon

SHAPES = ((16, 16), (8, 40), (40, 8), (1, 9), (9, 1), (33, 65), (1, 1))


BF16_PRODUCTS: dict[str, Any] = {"ns_dtype": "bfloat16"}
"""As in torch's, whatever the device."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"adjust_lr_fn": "original"},
        {"momentum": 0.8, "weight_decay": 0.0},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0)},
    ],
    ids=str,
)
def test_is_torch_muon(options: dict[str, Any]) -> None:
    muon = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    shared = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "eps": 1e-7}
    own = {**BF16_PRODUCTS, "hybrid": OFF}
    ours, theirs = matrices(SHAPES), matrices(SHAPES)
    optimizer = HybridOptimizer(ours, base="muon", **{**own, **shared, **options})
    reference = muon(theirs, **{**shared, **options})
    for _ in random_gradients(ours, theirs, steps=20):
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs):
        assert float((mine - other).detach().norm() / other.detach().norm()) < 1e-6


def test_checkpoint_of_torch_muon_goes_on() -> None:
    muon = getattr(torch.optim, "Muon", None) or pytest.skip("this torch has no Muon")
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    theirs = matrices(SHAPES)
    reference = muon(theirs, **options)
    for _ in random_gradients(theirs, steps=3):
        reference.step()
    ours = [nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = HybridOptimizer(ours, base="muon", hybrid=OFF, **BF16_PRODUCTS, **options)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["base"] == "muon"
    assert "momentum_buffer" not in optimizer.state[ours[0]]
    for _ in random_gradients(ours, theirs, steps=3):
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs):
        assert float((mine - other).detach().norm() / other.detach().norm()) < 1e-6


# ------------------------------------------------------------------------------ the phases


def test_state_has_no_second_moment() -> None:
    model = make_deep_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    hidden, rest = (group["params"] for group in optimizer.param_groups)
    assert set(optimizer.state[hidden[0]]) == {
        "step",
        "exp_avg",
        "slow_ema",
        "prediction",
    }
    assert {"exp_avg_sq", "direction"} <= set(optimizer.state[rest[0]])


@pytest.mark.parametrize("predictor", MIXING)
def test_predictions_leave_matrices_frozen(predictor: str) -> None:
    """They move AdamW's tensors alone."""
    model = make_deep_model()
    optimizer = make_optimizer(model, hybrid=fast_config(predictor=predictor, inline=False))
    hidden = optimizer.param_groups[0]["params"]
    moved = 0

    def check(index: int, phase: Phase) -> None:
        nonlocal moved
        if phase is Phase.PREDICT:
            moved += 1
            assert_same_weights([p.detach() for p in hidden], before)
            assert any(not torch.equal(a, b) for a, b in zip(weights(optimizer), everything))
        before[:] = [p.detach().clone() for p in hidden]
        everything[:] = weights(optimizer)

    before: list[Tensor] = [p.detach().clone() for p in hidden]
    everything = weights(optimizer)
    train(model, optimizer, 40, after=check)
    assert moved > 5


@pytest.mark.parametrize("predictor", MIXING)
def test_does_not_predict_where_nothing_would_move(predictor: str) -> None:
    (param,) = matrices(((6, 8),))
    optimizer = HybridOptimizer([param], base="muon", hybrid=fast_config(predictor=predictor))
    for _ in random_gradients([param], steps=20):
        optimizer.step()
    assert optimizer.stats().predicted_steps == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs without a GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_auto_still_measures(backend: str) -> None:
    """Whichever rule comes last: confidence and signal are those of both groups."""
    entries = []
    for turned in (False, True):
        model = make_deep_model()
        groups = split_param_groups(model)[:: -1 if turned else 1]
        optimizer = HybridOptimizer(
            groups, lr=1e-2, backend=backend, hybrid=HybridConfig(warmup_steps=3)
        )
        train(model, optimizer, 4)
        stats = optimizer.stats()
        entries.append((stats.confidence, stats.signal))
        assert stats.confidence > 0
    assert entries[0] == pytest.approx(entries[1], rel=1e-3)


@pytest.mark.parametrize("predictor", MIXING)
@pytest.mark.parametrize("nesterov", [True, False])
def test_slow_ema_takes_part_in_the_momentum(
    predictor: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_hybrid.kernels.newton_schulz_torch.MIX_GRADIENTS", 20.0)
    (param,) = matrices(((6, 20),))
    weight, momentum, lr = param.detach().double(), 0.9, 1e-2
    fast, slow = torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer = HybridOptimizer(
        [param], lr=lr, weight_decay=0.0, base="muon", momentum=momentum, nesterov=nesterov,
        hybrid=HybridConfig(predictor=predictor), ns_dtype="float32",
    )  # fmt: skip
    for step in random_gradients([param], steps=30):
        g = param.grad.double()
        fast.lerp_(g, 1 - momentum**3)
        mixed = g + momentum**3 * (fast - g) if nesterov else fast
        mixed = mixed + 0.6 * min(step / 20, 1) * (slow - mixed)
        slow.lerp_(g, 4 / (step + 4))
        weight -= lr * 0.2 * math.sqrt(20) * newton_schulz_torch(mixed, QUINTIC * 5)
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.5}, {"hybrid": fast_config(predictor="linear")}]
)
def test_single_momentum_where_memory_hurts_or_nothing_is_mixed(options: dict[str, Any]) -> None:
    ours, theirs = matrices(((6, 8), (9, 4))), matrices(((6, 8), (9, 4)))
    mixing = HybridOptimizer(ours, base="muon", **{"hybrid": fast_config(), **options})
    plain = HybridOptimizer(theirs, base="muon", **{**options, "hybrid": OFF})
    compared = 0
    for _ in random_gradients(ours, theirs, steps=20):
        mixing.step()
        plain.step()
        if mixing.phase is Phase.CORRECT:  # `linear` has moved its own
            break
        assert_same_weights([p.detach() for p in ours], [p.detach() for p in theirs])
        compared += 1
    assert compared > 5


def test_clipping_is_global_over_both_rules() -> None:
    """The AdamW tensors feel the gradient of the Muon matrix in the norm."""
    moments = []
    for scale in (1.0, 100.0):
        matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))
        optimizer = HybridOptimizer(
            [{"params": [matrix], "base": "muon"}, {"params": [vector]}],
            lr=1e-2, max_grad_norm=1.0, hybrid=OFF,
        )  # fmt: skip
        matrix.grad, vector.grad = scale * torch.ones(4, 4), torch.ones(3)
        optimizer.step()
        moments.append(float(optimizer.state[vector]["exp_avg"][0]))
    assert moments[0] == pytest.approx(0.1 / math.sqrt(19), rel=1e-5)
    assert moments[1] == pytest.approx(0.1 / math.sqrt(160003), rel=1e-5)


# ------------------------------------------------------------------------------ the options


def test_new_settings_take_hold_between_steps() -> None:
    (param,) = matrices(((8, 8),))
    optimizer = HybridOptimizer(
        [param], lr=1.0, weight_decay=0.0, base="muon", hybrid=OFF, ns_dtype="float32"
    )
    moves = []
    for step in random_gradients([param], steps=2):
        if step == 1:
            optimizer.param_groups[0]["ns_steps"] = 1
        before = param.detach().clone()
        optimizer.step()
        moves.append(float(torch.linalg.svdvals(before - param.detach()).min()))
    assert moves[1] < 0.5 * moves[0], "one step leaves small singular values small"


def test_blocks_of_a_fused_matrix_move_as_separate_ones() -> None:
    (fused,) = matrices(((12, 4),))
    apart = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    options: dict[str, Any] = {"lr": 1e-2, "base": "muon", "hybrid": OFF}
    one = HybridOptimizer([{"params": [fused], "blocks": (3, 1)}], **options)
    many = HybridOptimizer(apart, **options)
    for _ in random_gradients([fused], steps=3):
        for param, grad in zip(apart, fused.grad.chunk(3)):  # type: ignore[union-attr]
            param.grad = grad.clone()
        one.step()
        many.step()
    for param, part in zip(apart, fused.detach().chunk(3)):
        assert torch.allclose(param, part, atol=1e-7)


def test_original_scale_knows_inputs_from_outputs() -> None:
    moves = []
    for transposed in (False, True):
        (param,) = matrices(((16, 4),))
        before = param.detach().clone()
        optimizer = HybridOptimizer(
            [{"params": [param], "transposed": transposed}],
            lr=1.0, weight_decay=0.0, base="muon", adjust_lr_fn="original", hybrid=OFF,
        )  # fmt: skip
        for _ in random_gradients([param], steps=1):
            optimizer.step()
        moves.append(float((before - param.detach()).norm()))
    assert moves[0] == pytest.approx(2.0 * moves[1], rel=1e-4), "16 outputs of 4 inputs"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"momentum": 1.0}, r"momentum=1.0: must be a number in \[0, 1\)"),
    ({"nesterov": 1}, "nesterov=1: must be True or False"),
    ({"ns_steps": 0}, "ns_steps=0: must be a whole number from 1 to 99"),
    ({"ns_steps": 2.5}, "ns_steps=2.5"),
    ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients="),
    ({"ns_coefficients": ((1.0, 2.0, 3.0), 4.0)}, "ns_coefficients="),
    ({"ns_coefficients": (1.0, math.nan, 3.0)}, "ns_coefficients="),
    ({"adjust_lr_fn": "adam"}, "adjust_lr_fn='adam'"),
    ({"ns_dtype": "float16"}, "ns_dtype='float16'"),
    ({"blocks": (0, 1)}, r"blocks=\(0, 1\)"),
    ({"blocks": ((1, 1), (1, 1))}, "blocks="),
    ({"blocks": (3, 1)}, r"blocks=\(3, 1\): must divide the shape \(4, 6\)"),
    ({"transposed": (True, False)}, "transposed="),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    (param,) = matrices(((4, 6),))
    with pytest.raises(ValueError, match=message):
        HybridOptimizer([{"params": [param], "base": "muon", **options}])


def test_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"unknown arguments \['momentun'\]"):
        HybridOptimizer(matrices(((4, 6),)), base="muon", momentun=0.9)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_only_matrices_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be a matrix; split_param_groups"):
        HybridOptimizer([nn.Parameter(torch.zeros(shape))], base="muon")
