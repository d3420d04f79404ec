"""The optimizer is its reference: the same phases, and the same weights to rounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.reference import Reference

SHAPES = ((5, 9), (9,), (8, 3), (2, 3, 4), ())
MATRICES = ((5, 9), (7, 7))
CENTRE = 8.0
"""Where the loss is least: no weight comes near zero. Where one is far smaller than its
displacement, last bits, which FP32 factors change, decide whether a byte tells what was there."""


def training(
    weights: list[Tensor], step: int, seed: int, noise: float
) -> tuple[list[Tensor], float]:
    """Gradients and loss of a noisy quadratic, with what upsets an optimizer now and then."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    outlier = 60.0 if step % 17 == 11 else 1.0
    gradients, loss = [], 0.0
    for index, w in enumerate(weights):
        curvature = torch.linspace(0.3, 2.0, max(w.numel(), 1), dtype=torch.float64)
        curvature = curvature[: w.numel()].view(w.shape)
        random = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        gradient = curvature * (w - CENTRE) + noise * outlier * random
        if step % 23 in (13, 14) and index == 0:
            gradient = gradient * math.nan
        loss += 0.5 * float((curvature * (w - CENTRE) ** 2).sum())
        gradients.append(gradient)
    return gradients, loss * (30.0 if step % 19 == 7 else 1.0)


@settings(max_examples=max(20, settings().max_examples))
@given(
    base=st.sampled_from(("adamw", "lion", "muon")),
    predictor=st.sampled_from(("auto", "slow_ema", "secant", "linear", "none")),
    seed=st.integers(0, 99),
    noise=st.sampled_from((0.0, 0.02, 0.3)),
    decays=st.booleans(),
    observes=st.booleans(),
    max_grad_norm=st.sampled_from((None, 2.0)),
    interval=st.integers(1, 3),
)
def test_the_optimizer_is_its_reference(
    base: str,
    predictor: str,
    seed: int,
    noise: float,
    decays: bool,
    observes: bool,
    max_grad_norm: float | None,
    interval: int,
) -> None:
    assume(base == "adamw" or predictor != "secant")
    config = HybridConfig(
        warmup_steps=4, full_steps=3, max_predict_steps=4, correction_interval=interval,
        confidence_threshold=0.0, predictor=predictor,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = MATRICES if base == "muon" else SHAPES
    double: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    start = [CENTRE + torch.randn(s, **double) for s in shapes]
    betas = (0.9, 0.99)
    options: dict[str, Any] = {"betas": betas, "weight_decay": 0.1, "eps": 1e-8}
    theirs = [tensor.clone() for tensor in start]
    reference = Reference(theirs, config, base, **options, max_grad_norm=max_grad_norm or math.inf)
    ours = [nn.Parameter(tensor.clone()) for tensor in start]
    if base == "muon":
        options |= {"ns_dtype": "float32"}
    optimizer = HybridOptimizer(
        ours, base=base, hybrid=config, max_grad_norm=max_grad_norm, **options
    )
    for step in range(60):
        assert optimizer.phase is reference.phases.phase, f"step {step}"
        lr = 1e-2 * (1.0 - step / 100 if decays else 1.0)
        reference.options.lr = optimizer.param_groups[0]["lr"] = lr
        # Both see the gradients of the reference's weights: rounding does not build up.
        gradients, loss = training(theirs, step, seed, noise)
        for param, gradient in zip(ours, gradients):
            param.grad = gradient.clone()
        if observes:
            optimizer.observe_loss(loss)
        optimizer.step()
        reference.step(gradients, loss if observes else math.nan)
        for param, weight in zip(ours, theirs):
            # Horizon factors and step fractions are FP32, Muon's products too.
            tolerance = 1e-4 if base == "muon" or predictor in ("slow_ema", "auto") else 1e-6
            torch.testing.assert_close(param.detach(), weight, rtol=tolerance, atol=tolerance)
    ledger, stats = reference.ledger, optimizer.stats()
    assert stats.rollbacks == ledger.rejected
    assert predictor != "auto" or stats.predictor == reference.model
    if predictor in ("slow_ema", "linear"):
        assert stats.confidence == pytest.approx(ledger.confidence, abs=1e-3)


def test_where_losses_are_flat_both_stop_predicting() -> None:
    """At a floor the losses are noise; once they fall again, both predict again."""
    shapes, config = ((7, 5), (7,)), HybridConfig(warmup_steps=4, full_steps=3)
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.full(shape, CENTRE, dtype=torch.float64) for shape in shapes]
    ours = [nn.Parameter(tensor.clone()) for tensor in theirs]
    reference = Reference(theirs, config, "adamw", lr=1e-3)
    optimizer = HybridOptimizer(ours, lr=1e-3, hybrid=config)
    counts = []
    for step in range(900):
        assert optimizer.phase is reference.phases.phase, f"step {step}"
        noise = float(torch.randn((), generator=generator))
        loss = 5.0 + noise - 0.1 * max(step - 700, 0)
        drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        gradients = [torch.randn(shape, **drawn) for shape in shapes]
        for param, gradient in zip(ours, gradients):
            param.grad = gradient.clone()
        optimizer.observe_loss(loss)
        optimizer.step()
        reference.step(gradients, loss)
        counts.append(optimizer.stats().predicted_steps)
    for param, weight in zip(ours, theirs):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-4, atol=1e-4)
    assert counts[390] > 100, "too few losses to say"
    assert counts[690] - counts[410] < 40, "the loss is flat"
    assert counts[890] - counts[790] > 30, "it falls"
