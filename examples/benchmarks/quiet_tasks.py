"""Training problems without noise: the weights of a network, and the same loss at every step.

All in FP64: in FP32 rounding decides where the best runs end. The seed decides the first weights,
and the points where points are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from lib.scikit_data import scikit_datasets

Problem = tuple[nn.Module, Callable[[], Tensor]]
"""A model, and its loss as a function of its present weights."""


def network(seed: int, *sizes: int) -> nn.Sequential:
    """A tanh network."""
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def derivatives(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tanh network and its derivatives along each coordinate.

    They go through the layers together, which is exact and far cheaper than differentiating twice.

    Args:
        model: Of `network`, with one output.
        x: Points, ``[points, dimensions]``.

    Returns:
        Values ``[points]``, first and second derivatives ``[dimensions, points]``.
    """
    value, second = x, torch.zeros(x.shape[1], *x.shape, dtype=x.dtype)
    first = second + torch.eye(x.shape[1], dtype=x.dtype).unsqueeze(1)
    for layer in model:
        value = layer(value)
        if isinstance(layer, nn.Linear):
            first, second = first @ layer.weight.T, second @ layer.weight.T
        else:
            slope = 1 - value.square()
            second = slope * (second - 2 * value * first.square())
            first = slope * first
    return value.squeeze(-1), first.squeeze(-1), second.squeeze(-1)


def points(seed: int, count: int) -> Tensor:
    """Evenly scattered points of the unit square, ``[count, 2]``."""
    return SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)


def spirals(seed: int) -> Problem:
    """Two spirals of 200 points each, to be told apart."""
    generator = torch.Generator().manual_seed(seed)
    angle = 3 * math.pi * torch.rand(200, generator=generator).sqrt()
    arm = torch.stack([angle.cos() * angle, angle.sin() * angle], 1) / 10
    x = (torch.cat([arm, -arm]) + 0.02 * torch.randn(400, 2, generator=generator)).double()
    y = torch.arange(2).repeat_interleave(200)
    model = network(seed, 2, 64, 64, 2)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def regression(seed: int) -> Problem:
    """A function of two scales."""
    model = network(seed, 1, 64, 64, 1)
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).unsqueeze(1)
    y = (4 * math.pi * x).sin() + 0.3 * (10 * math.pi * x).sin()
    return model, lambda: (model(x) - y).square().mean()


def digits(seed: int) -> Problem:
    """1,400 handwritten digits, all in every gradient."""
    data = scikit_datasets().load_digits()
    x = torch.tensor(data.data[:1400] / 16.0, dtype=torch.float64)
    y = torch.tensor(data.target[:1400])
    model = network(seed, 64, 64, 64, 10)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def poisson(seed: int) -> Problem:
    """A physics-informed network for u'' = f with u = 0 at both ends."""
    model = network(seed, 1, 32, 32, 1)
    x = torch.linspace(0, 1, 128, dtype=torch.float64).unsqueeze(1)
    source = -(math.pi**2) * ((math.pi * x).sin() + 4 * (4 * math.pi * x).sin()).squeeze(1)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def loss() -> Tensor:
        _, _, second = derivatives(model, x)
        residual = (second[0] - source).square().mean() / source.square().mean()
        return 100 * (residual + model(ends).square().mean())

    return model, loss


def helmholtz(seed: int, hidden: Sequence[int] = (32, 32), count: int = 256) -> Problem:
    """One for Δu + u = f on [-1, 1]², with u = 0 at the border, of u = sin(πx) sin(2πy).

    As in Wang, Teng and Perdikaris (arXiv 2001.04536), with half of the frequency along y: 500
    evaluations are too few for theirs.
    """
    model = network(seed, 2, *hidden, 1)
    x = 2 * points(seed, count) - 1
    source = (1 - 5 * math.pi**2) * (math.pi * x[:, 0]).sin() * (2 * math.pi * x[:, 1]).sin()
    along = torch.linspace(-1, 1, 16, dtype=torch.float64)
    side = torch.ones_like(along)
    border = torch.cat(
        [torch.stack(pair, 1) for end in (-side, side) for pair in ((along, end), (end, along))]
    )

    def loss() -> Tensor:
        value, _, second = derivatives(model, x)
        residual = (second.sum(0) + value - source).square().mean() / source.square().mean()
        return 100 * (residual + model(border).square().mean())

    return model, loss


def burgers(seed: int) -> Problem:
    """One for u_t + u u_x = 0.01/π u_xx, u(0, x) = -sin(πx), u = 0 at x = -1 and 1, t up to 1.

    The problem is that of Raissi, Perdikaris and Karniadakis (2019): a front at x = 0.
    """
    model = network(seed, 2, 32, 32, 32, 1)
    tx = points(seed, 256) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    x = torch.linspace(-1, 1, 32, dtype=torch.float64)
    t = torch.linspace(0, 1, 16, dtype=torch.float64)
    starts = [torch.stack([torch.zeros_like(x), x], 1)]
    ends = [torch.stack([t, torch.full_like(t, side)], 1) for side in (-1.0, 1.0)]
    border = torch.cat([*starts, *ends])
    wanted = torch.cat([-(math.pi * x).sin(), torch.zeros(32, dtype=torch.float64)])

    def loss() -> Tensor:
        value, first, second = derivatives(model, tx)
        residual = first[0] + value * first[1] - 0.01 / math.pi * second[1]
        return residual.square().mean() + (model(border).squeeze(1) - wanted).square().mean()

    return model, loss


TASKS: dict[str, Callable[[int], Problem]] = {
    "spirals": spirals,
    "regression": regression,
    "digits": digits,
    "poisson": poisson,
    "helmholtz": helmholtz,
    "burgers": burgers,
}
SMALL = tuple(TASKS)
"""Of 1,000 to 9,000 weights. What follows is larger: there evaluations are what takes time."""
TASKS["helmholtz_wide"] = partial(helmholtz, hidden=(128, 128, 128), count=512)
