"""Pictures: scikit-learn's digits somewhere among pieces of other digits, by a residual network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontier.tasks.base import Batch, Task, draw
from frontier.tasks.tables import load_table

SIDE, DIGIT, PIECE = 16, 8, 4  # pixels
PIECES = 3
BRIGHTNESS, NOISE = 0.7, 0.2  # of the pieces; of every pixel
PICTURES = {"training": 6_000, "held out": 1_200}
CHANNELS = (16, 32, 48)
GROUPS = 4


def _squares(corners: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels of squares, ``[squares, side, 1]`` and ``[..., 1, side]``."""
    along = torch.arange(side)
    return corners[:, 0, None, None] + along[:, None], corners[:, 1, None, None] + along


def _pictures(digits: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Each chosen digit at a place of its own, over pieces of others, under noise."""
    count = len(chosen)
    made = torch.zeros(count, SIDE, SIDE)
    each = torch.arange(count)[:, None, None]

    def corners(side: int, limit: int) -> tuple[Tensor, Tensor]:
        places = torch.randint(limit - side + 1, (count, 2), generator=generator)
        return _squares(places, side)

    for _ in range(PIECES):
        others = torch.randint(len(digits), (count, 1, 1), generator=generator)
        piece = digits[(others, *corners(PIECE, DIGIT))]
        made[(each, *corners(PIECE, SIDE))] += BRIGHTNESS * piece
    made[(each, *corners(DIGIT, SIDE))] = digits[chosen]
    return (made + NOISE * torch.randn(made.shape, generator=generator))[:, None]


@lru_cache(maxsize=4)
def load_pictures(device: str) -> tuple[Batch, Batch]:
    """Returns training and held-out pictures with their digits; none is in both."""
    found = []
    parts = load_table("digits", "cpu")[:2]
    for seed, ((flat, classes), count) in enumerate(zip(parts, PICTURES.values())):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(flat), (count,), generator=generator)
        digits = flat.view(-1, DIGIT, DIGIT) + 0.3  # black is 0 there
        pictures = _pictures(digits, chosen, generator)
        found.append((pictures.to(device), classes[chosen].to(device)))
    return found[0], found[1]


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        norms = [nn.GroupNorm(GROUPS, channels) for _ in range(2)]
        filters = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        layers = [norms[0], nn.ReLU(), filters[0], norms[1], nn.ReLU(), filters[1]]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the layers make of the input."""
        added: Tensor = x + self.layers(x)
        return added


@dataclass(frozen=True)
class Pictures(Task):
    """Which digit stands in a picture of 16 x 16 pixels, by a residual convolutional network."""

    batch_size: int = 32

    name: ClassVar[str] = "pictures"
    learning_rates: ClassVar[tuple[float, ...]] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

    def new_model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *CHANNELS), CHANNELS):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), Residual(outputs), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * CHANNELS[-1], 10))

    def batch(self, seed: int, index: int) -> Batch:
        pictures, classes = load_pictures(self.device)[0]
        chosen = draw(seed, index, len(pictures), (self.batch_size,)).to(self.device)
        return pictures[chosen], classes[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def held_out(self, model: nn.Module, quick: bool = False) -> float:
        pictures, classes = load_pictures(self.device)[1]
        count = len(pictures) // 4 if quick else len(pictures)
        return float(self.loss(model, (pictures[:count], classes[:count])))

    def data(self) -> str:
        made = ", ".join(f"{count} {part}" for part, count in PICTURES.items())
        return f"scikit-learn digits among pieces of others, {SIDE} x {SIDE} pixels: {made}"
