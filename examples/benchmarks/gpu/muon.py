"""Section: Muon's step beside ``torch.optim.Muon`` and a compiled batch of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.context import Context, parameters
from gpu.timing import Clock, Run, ratios, spread
from lib.gpt2_shapes import GPT2_SIZES, Gpt2Size, Matrix
from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.rules.muon import MUON, rate_scale, schedule

OURS, COMPILED = "hybrid muon", "torch.compile, stacked blocks"
TORCH_BLOCKS = "torch.optim.Muon, same blocks"
TORCH_WHOLE = "torch.optim.Muon, c_attn whole"
RATE, DECAY, MOMENTUM, EPS = 0.1, 0.1, 0.95, 1e-7
SETTINGS: dict[str, Any] = {"lr": RATE, "weight_decay": DECAY, "eps": EPS, "momentum": MOMENTUM}
"""The rate is large, so that rounding of the weights does not hide the update's error."""
ROUNDS = 10
BYTES = 42  # of a parameter: what all of them keep, and what lives during a step
LIMIT_OF_TORCH = 0.5  # what our step may take of ``torch.optim.Muon``'s for the same blocks
APART = 0.05  # of first updates in BF16: not every sum is added up in one order
TINY = (Gpt2Size("tiny", 16, 1),)


def hybrid_muon(params: Sequence[Tensor], matrices: Sequence[Matrix]) -> HybridOptimizer:
    """Ours for some matrices, without predictions, with its kernels on every device."""
    grids = tuple(matrix.grid for matrix in matrices)
    group = {"params": list(params), "base": "muon", "blocks": grids, "transposed": True}
    still = HybridConfig(predictor="none")
    return HybridOptimizer([group], backend="triton", hybrid=still, **SETTINGS)


def stacked_step(weight: Tensor, gradient: Tensor, momentum: Tensor) -> None:
    """Muon in plain torch, for a stack of matrices of one shape, in place."""
    rows, columns = weight.shape[-2:]
    momentum.lerp_(gradient, 1 - MOMENTUM)
    update = gradient.lerp(momentum, MOMENTUM).bfloat16()
    x = update.mT if rows > columns else update
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for a, b, c in schedule(MUON.defaults):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if rows > columns else x
    scale = rate_scale("match_rms_adamw", rows, columns)
    weight.mul_(1 - RATE * DECAY).add_(x, alpha=-RATE * scale)


def stacks(matrices: Sequence[Matrix], wholes: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the blocks of each shape behind each other, as one tensor."""
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for matrix, whole in zip(matrices, wholes):
        down, across = matrix.grid
        blocks = [block for part in whole.chunk(down) for block in part.chunk(across, dim=1)]
        by_shape.setdefault(matrix.block, []).extend(blocks)
    return [torch.stack(blocks) for blocks in by_shape.values()]


class Contenders:
    """Steps of all from equal weights; none shares ours, which would look at what others wrote."""

    def __init__(self, context: Context, matrices: Sequence[Matrix]) -> None:
        shapes = [matrix.shape for matrix in matrices]
        own, whole = (context.normal(shapes, 0.02) for _ in range(2))
        gradients = context.normal(shapes, 1e-3, offset=1)
        blocks, plain, grads = (stacks(matrices, each) for each in (own, own, gradients))
        momenta = [torch.zeros_like(tensor) for tensor in plain]
        self.steps: dict[str, Run] = {OURS: hybrid_muon(parameters(own, gradients), matrices).step}
        if hasattr(torch.optim, "Muon"):  # since 2.9
            every = ([b for tensor in side for b in tensor.unbind()] for side in (blocks, grads))
            for name, params in (
                (TORCH_BLOCKS, parameters(*every)),
                (TORCH_WHOLE, parameters(whole, gradients)),
            ):
                muon = torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **SETTINGS)
                self.steps[name] = muon.step
        # Compiled anew for each model: shapes are constants then.
        torch._dynamo.reset()
        run = torch.compile(stacked_step, dynamic=False) if context.on_gpu else stacked_step

        @torch.no_grad()
        def step() -> None:
            for each in zip(plain, grads, momenta):
                run(*each)

        self.steps[COMPILED] = step
        self.weights: dict[str, Callable[[], list[Tensor]]] = {
            OURS: lambda: stacks(matrices, own),
            TORCH_BLOCKS: lambda: blocks,
            COMPILED: lambda: plain,
        }


def muon(context: Context) -> None:
    """Compares the first updates, then times the steps in turn, for every size of GPT-2."""
    clock = Clock(context)
    if not hasattr(torch.optim, "Muon"):
        context.skip("torch.optim.Muon", f"torch {torch.__version__} does not have it")
    for size in GPT2_SIZES if context.on_gpu else TINY:
        name, matrices = f"GPT-2 {size.name}", size.matrices()
        elements = sum(math.prod(matrix.shape) for matrix in matrices)
        if context.has_room(name, BYTES * elements):
            contenders = Contenders(context, matrices)
            if size in (GPT2_SIZES[0], TINY[0]):
                compare(context, name, contenders)
            try:
                tell(context, name, *clock.in_turn(contenders.steps, ROUNDS))
            except torch.cuda.OutOfMemoryError as error:
                context.skip(name, str(error)[:80])
            del contenders


@torch.no_grad()
def compare(context: Context, name: str, contenders: Contenders) -> None:
    """Lets each take a first step, and compares how far the weights have moved."""
    start = [weight.clone() for weight in contenders.weights[OURS]()]
    for step in contenders.steps.values():
        step()

    def moved(which: str) -> list[Tensor]:
        pairs = zip(start, contenders.weights[which]())
        return [(1 - RATE * DECAY) * before - after for before, after in pairs]

    ours = moved(OURS)
    for other in (TORCH_BLOCKS, COMPILED):
        if other in contenders.steps:
            theirs = moved(other)
            apart = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs)]).norm()
            error = float(apart / torch.cat([t.flatten() for t in theirs]).norm())
            context.check(f"{name}: first update beside {other}", error < APART, error, APART)


def tell(
    context: Context, model: str, ahead: dict[str, list[float]], alone: dict[str, list[float]]
) -> None:
    """Summarises the rounds, and judges ours beside ``torch.optim.Muon``."""
    for name in ahead:
        times = {"device_ms": spread(ahead[name]), "from_idle_ms": spread(alone[name])}
        ratio = {"ours_/_this": ratios(ahead[OURS], ahead[name])}
        ratio["from_idle"] = ratios(alone[OURS], alone[name])["median"]
        context.row(model=model, optimizer=name, **times, **ratio)
        if name == TORCH_BLOCKS:
            found = ratio["ours_/_this"]["median"]
            held = found < LIMIT_OF_TORCH or not context.on_gpu
            context.check(f"{model}: ours / {name}", held, found, LIMIT_OF_TORCH)
