"""The dynamics model on trajectories whose continuation is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from training import fast_config
from triton_hybrid.kernels.ledger import INDEX

from triton_hybrid import HybridConfig, HybridOptimizer

BACKENDS = ["torch", "triton"]


def bound(predictor: str, backend: str, history: int = 4) -> tuple[HybridOptimizer, list[Tensor]]:
    """An optimizer whose weights the test moves by hand."""
    params = [nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(3, 7))]
    config = HybridConfig(
        predictor=predictor, history=history, confidence_threshold=0.0, full_steps=1
    )
    optimizer = HybridOptimizer(params, lr=1e-3, backend=backend, hybrid=config)
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    return optimizer, params


def place(params: list[Tensor], values: Tensor) -> None:
    begin = 0
    for param in params:
        param.data.copy_(values[begin : begin + param.numel()].view_as(param))
        begin += param.numel()


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params])


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_learns_the_ratio_of_successive_displacements(backend: str) -> None:
    optimizer, params = bound("linear", backend)
    generator = torch.Generator().manual_seed(0)
    limit, mode = torch.randn(2, 61, generator=generator)
    model = optimizer._engine.predictor
    for k in range(5):
        place(params, limit + 0.8**k * mode)
        model.end_cycle()
    optimizer._engine.begin_stretch()
    model.move(first=True)
    expected = limit + 0.8**5 * mode
    assert (flat(params) - expected).norm() < 1e-4 * mode.norm()
    assert optimizer.stats().confidence > 0.99


def test_a_random_walk_gives_no_confidence() -> None:
    optimizer, params = bound("linear", "torch")
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        place(params, flat(params) + torch.randn(61, generator=generator))
        optimizer._engine.predictor.end_cycle()
    assert optimizer.stats().confidence < 0.4


@pytest.mark.parametrize(("backend", "steps"), [("torch", 60), ("triton", 20)])
def test_noisy_run_is_adamw_plus_the_predicted_steps(backend: str, steps: int) -> None:
    """A run by hand. A corrector that acted on noise once made this run drift."""
    torch.manual_seed(0)
    param, twin = (nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(2))
    config = fast_config(divergence_threshold=1e6, correction_interval=2, slow_beta=0.9)
    optimizer = HybridOptimizer([param], lr=1e-2, backend=backend, hybrid=config)
    adamw = torch.optim.AdamW([twin], lr=1e-2)
    slow = torch.zeros(300)
    generator = torch.Generator().manual_seed(0)
    for n in range(steps):
        param.grad = 0.3 + torch.randn(300, generator=generator)
        twin.grad = param.grad.clone()
        seen = optimizer.stats().predicted_steps
        optimizer.step()
        adamw.step()
        slow.lerp_(twin.grad, 1 - min(n / (n + 4), 0.9))
        square = adamw.state[twin]["exp_avg_sq"] / (1 - 0.999 ** (n + 1))
        for _ in range(optimizer.stats().predicted_steps - seen):
            with torch.no_grad():
                twin -= 0.25e-2 * slow / (square.sqrt() + 1e-8)
    assert optimizer.stats().predicted_steps > 0.6 * steps
    assert optimizer.stats().rollbacks == 0
    # The few weights that are too small beside their displacement stay where they are.
    assert (param - twin).norm() < 1e-3 * twin.norm()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.8])
def test_the_signal_share_is_measured_without_bias(share: float) -> None:
    """A constant mean gradient plus noise of known size."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(20000))
    mean = torch.randn(20000) * share**0.5
    optimizer = HybridOptimizer(
        [param], lr=0.0, weight_decay=0.0, hybrid=fast_config(predictor="slow_ema")
    )
    for _ in range(60):
        param.grad = mean + torch.randn(20000) * (1 - share) ** 0.5
        optimizer.step()
    assert optimizer.stats().signal == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_corrector_finds_the_minimum_along_the_displacement(backend: str) -> None:
    """On a quadratic, with a noiseless gradient, the secant step fraction is exact."""
    param = nn.Parameter(torch.ones(64))
    config = fast_config(inline=False, divergence_threshold=100.0)
    optimizer = HybridOptimizer([param], lr=1e-2, backend=backend, hybrid=config, weight_decay=0.0)
    while optimizer.phase.needs_gradient:
        param.grad = param.detach().clone()
        optimizer.step()
    start = param.detach().clone()
    entry = optimizer.state[param]
    gradient = start.clone()
    optimizer.step()
    displacement = param.detach() - start
    # The slope before the move is taken from exp_avg; here it is told the true one.
    entry["prediction"][1] = float(gradient @ displacement)
    optimizer._engine.scalars.ledger[INDEX["signal"]] = 1.0
    param.grad = param.detach().clone()
    optimizer._engine.take_gradients()
    optimizer._engine.verify()
    expected = min(2.0, -float(gradient @ displacement) / float(displacement @ displacement))
    assert entry["prediction"][2].item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(param, start + expected * displacement, rtol=1e-5)
