"""Small training runs for the tests of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_memory import DEVICE
from torch import Tensor, nn
from triton_hybrid.kernels.multi_tensor import assembled

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups

FAST = {"warmup_steps": 2, "full_steps": 3, "confidence_threshold": 0.0}
"""A configuration that predicts early and whatever the confidence."""


def fast_config(**changes: Any) -> HybridConfig:
    """A configuration that reaches every phase within ten steps."""
    return HybridConfig(**{**FAST, "predictor": "slow_ema", **changes})


def short_config(**changes: Any) -> HybridConfig:
    """Cycles of a few steps: the second step already leads to a prediction."""
    return fast_config(**{"warmup_steps": 1, "full_steps": 1, "max_predict_steps": 2, **changes})


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 5)).to(DEVICE, dtype)


def make_deep_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """With a hidden matrix: the middle layer is Muon's."""
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 9), nn.Tanh(), nn.Linear(9, 5)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 split": (torch.bfloat16, {"master_weights": "split"}),
    "bf16 alone": (torch.bfloat16, {"master_weights": "none"}),
    "fp16 alone": (torch.float16, {"master_weights": "none"}),
    "lion": (torch.float32, {"base": "lion", "betas": (0.9, 0.99), "lr": 5e-3}),
    "lion bf16": (torch.bfloat16, {"base": "lion", "betas": (0.9, 0.99), "lr": 5e-3}),
    "muon": (torch.float32, {"weight_decay": 0.1}),
    "muon fp16": (torch.float16, {"weight_decay": 0.1}),
    "muon bf16": (torch.bfloat16, {"weight_decay": 0.1}),
}
"""What promises hold for: the dtype of parameters, the rule, how masters are kept."""


def run_of(kind: str, **options: Any) -> tuple[nn.Module, HybridOptimizer]:
    """A model of a kind and its optimizer; options of HybridConfig beside its own."""
    dtype, own = KINDS[kind]
    config = {key: options.pop(key) for key in [*options] if hasattr(HybridConfig(), key)}
    muon = kind.startswith("muon")
    model = make_deep_model(dtype) if muon else make_model(dtype)
    groups: Any = split_param_groups(model) if muon else model.parameters()
    settings = {"lr": 1e-2, **own, "hybrid": fast_config(**config), **options}
    return model, HybridOptimizer(groups, **settings)


def make_batches(seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(32, 12, generator=generator)
        y = (x[:, :5] * 2 + 0.1 * torch.randn(32, 5, generator=generator)).argmax(-1)
        yield x.to(DEVICE), y.to(DEVICE)


def backward(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Computes the gradient of the loss, or of a scaled one; returns the loss."""
    x, y = batch
    dtype = next(model.parameters()).dtype
    loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
    scale(loss).backward()
    return loss.detach()


def run_with_rejections(
    model: nn.Module, optimizer: HybridOptimizer, steps: int, passes: int = 1
) -> HybridOptimizer:
    """Trains; now and then a prediction is taken back."""
    batches = make_batches()
    for step in range(steps):
        if optimizer.needs_backward:
            for _ in range(passes):
                loss = backward(model, next(batches))
            rejected = step % 13 == 7 and optimizer.phase is Phase.CORRECT
            optimizer.observe_loss(float("inf") if rejected else loss)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batches: Iterator[tuple[Tensor, Tensor]] | None = None,
    observe: bool = True,
    after: Callable[[int, Phase], None] | None = None,
) -> list[Phase]:
    """Runs ``steps`` phase steps; returns the phases they were in."""
    batches = batches or make_batches()
    phases = []
    for index in range(steps):
        phase = optimizer.phase if isinstance(optimizer, HybridOptimizer) else Phase.FULL
        phases.append(phase)
        if phase.needs_gradient:
            loss = backward(model, next(batches))
            if observe and isinstance(optimizer, HybridOptimizer):
                optimizer.observe_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(index, phase)
    return phases


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


def masters_of(optimizer: HybridOptimizer) -> list[Tensor]:
    """The weights in FP32, where parameters have fewer bits and however masters are kept."""
    found = []
    for param, state in optimizer.state.items():
        if "remainder" in state:
            found.append(assembled(param.detach(), state["remainder"]))
        else:
            found.append(state.get("master", param).detach().float())
    return [master.clone() for master in found]


def state_copy(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of all state tensors, parameter by parameter."""
    return [
        {k: v.detach().clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for g in optimizer.param_groups
        for p in g["params"]
    ]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(as_int), right.contiguous().view(as_int))


def assert_same_weights(left: list[Tensor], right: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b), f"parameter {index} differs by {(a - b).abs().max()}"


def assert_same_state(
    left: list[dict[str, Tensor]], right: list[dict[str, Tensor]], but: tuple[str, ...] = ()
) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            if key not in but:
                assert same_bits(a[key], b[key]), f"state[{index}][{key!r}] differs"


def until(optimizer: HybridOptimizer, model: nn.Module, phase: Phase, limit: int = 60) -> None:
    """Trains until the next step is of the given phase."""
    batches = make_batches(7)
    for _ in range(limit):
        if optimizer.phase is phase:
            return
        train(model, optimizer, 1, batches)
    raise AssertionError(f"{phase} was not reached in {limit} steps")


def feed(
    optimizer: torch.optim.Optimizer, steps: int = 1, scale: float = 1.0, seed: int = 0
) -> list[Phase]:
    """Steps with gradients drawn around ``scale``, for whoever wants one; returns the phases."""
    phases = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        phases.append(getattr(optimizer, "phase", Phase.FULL))
        for group in optimizer.param_groups:
            for param in group["params"]:
                drawn = scale + 0.5 * scale * torch.randn(param.shape, generator=generator)
                wanted = param.requires_grad and phases[-1].needs_gradient
                param.grad = drawn.to(param) if wanted else None
        optimizer.step()
    return phases


def to_correct(optimizer: HybridOptimizer, least: int = 12) -> list[Tensor]:
    """Feeds until a prediction waits for its gradient.

    Returns the weights that the last prediction left: in the stepped drive they are the verified
    ones; inline nobody outside can see those, and these are one gradient older.
    """
    left = weights(optimizer)
    for step in range(60):
        if step >= least and optimizer.phase is Phase.CORRECT:
            return left
        left = weights(optimizer)
        feed(optimizer, seed=step)
    raise AssertionError("no prediction in 60 steps")


PRECISIONS = {
    "fp32": (torch.float32, "auto"),
    "bf16": (torch.bfloat16, "auto"),
    "split": (torch.bfloat16, "split"),
}
"""Dtypes of parameters, and how their masters are kept."""


def small_run(
    precision: str = "fp32", inline: bool = True, count: int = 2, **options: Any
) -> tuple[list[nn.Parameter], HybridOptimizer]:
    """Parameters of shape [4, 3], all near one, and an optimizer with short cycles."""
    dtype, masters = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(0)
    drawn = [1 + 0.1 * torch.randn(4, 3, generator=generator) for _ in range(count)]
    params = [nn.Parameter(values.to(dtype)) for values in drawn]
    options = {"lr": 1e-2, "hybrid": short_config(inline=inline), **options}
    return params, HybridOptimizer(params, master_weights=masters, **options)
