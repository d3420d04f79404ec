"""Small training problems at a constant rate, for putting another optimizer in AdamW's place.

Everything random is drawn from the seed, and no data depend on the optimizer, so two of them are
paired by seed. Measures are positive, lower is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from triton_hybrid import HybridOptimizer


class Told(HybridOptimizer):
    """One that is told its losses; the others are not."""


Measures = dict[str, float]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Problem = tuple[Callable[[int], None], Callable[[], Measures]]  # a step by index; a measurement

HELD_OUT = 1024
DIMENSIONS, NOISE, SHIFT = 8, 0.1, 1.0  # inputs of regression, noise of targets, move of inputs
WIDTH = 16  # of the linear map
MODES = torch.tensor([[2.0, 1.0], [-1.0, 1.5], [0.5, -2.0]])
SHARES, SPREAD = torch.tensor([0.5, 0.3, 0.2]), 0.3  # of the mixture's modes
STATES, FEATURES, DISCOUNT, TARGET_EVERY = 20, 8, 0.9, 25


def small_batch_regression(seed: int, make: MakeOptimizer, steps: int) -> Problem:
    """Batches of 16 from a smooth function with noise; the held-out error is without it."""
    return _regression(seed, make, 16, steps)


def shifting_regression(seed: int, make: MakeOptimizer, steps: int) -> Problem:
    """Regression whose inputs move and whose function changes at half of the run."""
    return _regression(seed, make, 32, steps // 2)


def _regression(seed: int, make: MakeOptimizer, size: int, shift_at: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    teachers = [_teacher(generator) for _ in range(2)]
    held_out = torch.randn(HELD_OUT, DIMENSIONS, generator=generator)
    model = _perceptron(seed, DIMENSIONS, size, size, 1)
    optimizer, shifted = make(model.parameters()), False

    def step(index: int) -> None:
        nonlocal shifted
        shifted = index >= shift_at
        x = torch.randn(size, DIMENSIONS, generator=generator) + SHIFT * shifted
        noise = NOISE * torch.randn(size, 1, generator=generator)
        _update(optimizer, mse_loss(model(x), teachers[shifted](x) + noise))

    def measure() -> Measures:
        x = held_out + SHIFT * shifted
        return {"held-out error": float(mse_loss(model(x), teachers[shifted](x)))}

    return step, measure


def linear_with_noise(seed: int, make: MakeOptimizer, steps: int) -> Problem:
    """A linear map from batches of 16 with noise: soon there is nothing left to learn.

    The held-out error is without noise: what the noise of the gradients leaves at this rate.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    held_out = torch.randn(HELD_OUT, WIDTH, generator=generator)
    model = _perceptron(seed, WIDTH, WIDTH)
    optimizer = make(model.parameters())

    def step(index: int) -> None:
        x = torch.randn(16, WIDTH, generator=generator)
        noise = torch.randn(16, WIDTH, generator=generator)
        _update(optimizer, mse_loss(model(x), x @ teacher + noise))

    def measure() -> Measures:
        return {"held-out error": float(mse_loss(model(held_out), held_out @ teacher))}

    return step, measure


def adversarial(seed: int, make: MakeOptimizer, steps: int) -> Problem:
    """A generator of points in the plane and its critic, each with an optimizer of its own.

    Beside the distance of the generated mean from the mixture's, the sliced Wasserstein distance
    notices missing modes.
    """
    generator = torch.Generator().manual_seed(seed)
    maker, critic = _perceptron(seed, 4, 32, 32, 2), _perceptron(seed + 1, 2, 32, 32, 1)
    of_maker, of_critic = make(maker.parameters()), make(critic.parameters())
    angles = torch.arange(32) * (torch.pi / 32)
    directions = torch.stack([angles.cos(), angles.sin()])
    projected = (_mixture(HELD_OUT, generator) @ directions).sort(0).values
    latent = torch.randn(HELD_OUT, 4, generator=generator)
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)

    def step(index: int) -> None:
        real = _mixture(64, generator)
        made = maker(torch.randn(64, 4, generator=generator))
        real_loss = cross_entropy(critic(real), ones)
        _update(of_critic, real_loss + cross_entropy(critic(made.detach()), zeros))
        _update(of_maker, cross_entropy(critic(made), ones))

    def measure() -> Measures:
        sample = maker(latent)
        away = torch.linalg.vector_norm(sample.mean(0) - SHARES @ MODES)
        sliced = ((sample @ directions).sort(0).values - projected).abs().mean()
        return {"distance of mean": float(away), "sliced Wasserstein": float(sliced)}

    return step, measure


def temporal_difference(seed: int, make: MakeOptimizer, steps: int) -> Problem:
    """TD(0) with a target network on a random Markov chain seen through random features.

    The error of the values is against the linear system's, relative to their spread.
    """
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.rand(STATES, STATES, generator=generator).pow(8)
    transitions /= transitions.sum(1, keepdim=True)
    rewards = torch.randn(STATES, generator=generator)
    values = torch.linalg.solve(torch.eye(STATES) - DISCOUNT * transitions, rewards)
    features = torch.randn(STATES, FEATURES, generator=generator)
    model, target = (_perceptron(seed, FEATURES, 32, 32, 1) for _ in range(2))
    optimizer = make(model.parameters())

    def step(index: int) -> None:
        if index % TARGET_EVERY == 0:
            target.load_state_dict(model.state_dict())
        states = torch.randint(STATES, (32,), generator=generator)
        after = torch.multinomial(transitions[states], 1, generator=generator).squeeze(1)
        wanted = rewards[states, None] + DISCOUNT * target(features[after]).detach()
        _update(optimizer, mse_loss(model(features[states]), wanted))

    def measure() -> Measures:
        error = mse_loss(model(features).squeeze(1), values).sqrt() / values.std()
        return {"error of values": float(error)}

    return step, measure


@dataclass(frozen=True)
class SwapTask:
    """A problem, with the settings that every optimizer gets."""

    problem: Callable[[int, MakeOptimizer, int], Problem]
    steps: int  # gradient evaluations of each optimizer
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    tails: tuple[float, ...] = (0.1,)  # last shares of a run that measures are means over

    def train(self, seed: int, make: MakeOptimizer, steps: int | None = None) -> Measures:
        """Trains once; measures are of the weights as steps leave them, and a mean over a tail."""
        steps = steps or self.steps
        step, measure = self.problem(seed, make, steps)
        counts = {share: max(1, int(share * steps)) for share in self.tails}
        found: list[Measures] = []
        for index in range(steps):
            step(index)
            if index >= steps - max(counts.values()):
                with torch.no_grad():
                    found.append(measure())
        return {
            f"{name}, last {share:.0%}": fmean(each[name] for each in found[-count:])
            for name in found[0]
            for share, count in counts.items()
        }


SWAP_TASKS = {
    "small-batch": SwapTask(small_batch_regression, 160, 1e-2),
    # It goes around in circles: a tenth of the run would be a matter of when it ends. After more
    # than 400 steps at this rate rounding alone has made another run of it.
    "gan": SwapTask(adversarial, 400, 3e-3, (0.5, 0.999), tails=(0.5,)),
    "gan-momentum": SwapTask(adversarial, 1000, 1e-3, tails=(0.5,)),
    "td": SwapTask(temporal_difference, 800, 3e-3),
    "shift": SwapTask(shifting_regression, 600, 3e-3, tails=(0.1, 0.5)),
    # Nothing but noise is left of the gradients after the first hundreds, and the rate stays.
    "floor": SwapTask(linear_with_noise, 2000, 3e-3, tails=(0.25,)),
}


def _perceptron(seed: int, *widths: int) -> nn.Sequential:
    """A tanh network, initialised by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def _teacher(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    inner = torch.randn(DIMENSIONS, 4, generator=generator) / DIMENSIONS**0.5
    outer = torch.randn(4, 1, generator=generator)
    return lambda x: torch.sin(2.0 * x @ inner) @ outer


def _mixture(count: int, generator: torch.Generator) -> Tensor:
    modes = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    return MODES[modes] + SPREAD * torch.randn(count, 2, generator=generator)


def _update(optimizer: Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if isinstance(optimizer, Told):
        optimizer.observe_loss(loss)
    optimizer.step()
