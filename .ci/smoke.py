"""Trains a small network with an installed triton_hybrid: both drives, a checkpoint.

The argument is the backend, "torch" or "triton".
"""

import importlib.metadata
import io
import sys

import torch
from torch import nn

from triton_hybrid import HybridConfig, HybridOptimizer, __file__, __version__, split_param_groups


def train(model: nn.Module, optimizer: HybridOptimizer, steps: int) -> float:
    """The loss after some steps."""
    torch.manual_seed(1)
    loss = torch.zeros(())
    for _ in range(steps):
        if optimizer.needs_backward:
            x = torch.randn(32, 8)
            loss = nn.functional.mse_loss(model(x), x[:, :2].sin())
            loss.backward()
            optimizer.observe_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    """Raises where something is not as it must be."""
    assert "site-packages" in __file__, __file__
    assert importlib.metadata.version("triton-hybrid") == __version__
    backend, steps = sys.argv[1], 30 if sys.argv[1] == "torch" else 12
    for inline in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 2))
        config = HybridConfig(inline=inline, warmup_steps=2, full_steps=2, confidence_threshold=0.0)
        groups = split_param_groups(model, lr=1e-2)
        optimizer = HybridOptimizer(groups, hybrid=config, backend=backend)
        first, last = train(model, optimizer, 2), train(model, optimizer, steps)
        stats = optimizer.stats()
        assert last < first, (first, last)
        assert stats.predicted_steps > 0, stats
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        print(f"{backend}, inline={inline}: loss {first:.3f} -> {last:.3f}")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "triton"))
    print(f"triton_hybrid {__version__} works with Python {sys.version.split()[0]}, {versions}")


if __name__ == "__main__":
    main()
