"""The optimizers that the section on Muon compares, for the same matrices and gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from suite_gpt2_shapes import Matrix
from suite_steps import Step
from torch import Tensor, nn
from triton_hybrid.base.muon import MUON_DEFAULTS, rate_scale, schedule

from triton_hybrid import HybridConfig, HybridOptimizer

OURS = "hybrid muon"
TORCH_BLOCKS = "torch.optim.Muon, same blocks"
TORCH_WHOLE = "torch.optim.Muon, c_attn whole"
COMPILED = "torch.compile, stacked blocks"
LR, DECAY, MOMENTUM, EPS = 0.1, 0.1, 0.95, 1e-7
"""The rate is large, so that rounding of the weights does not hide the update's error."""
Build = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def torch_muon() -> Build | None:
    """Makes torch's own Muon; None where torch has none (before 2.9)."""
    build = getattr(torch.optim, "Muon", None)
    if build is None:
        return None
    return functools.partial(
        build, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, eps=EPS,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """Inside, torch adds up all products of BF16 in FP32, as the kernels do."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def hybrid_muon(
    params: Sequence[Tensor], matrices: Sequence[Matrix], **options: Any
) -> HybridOptimizer:
    """Ours, without predictions, with its kernels on every device.

    Args:
        params: The parameters.
        matrices: For each, the blocks that it is.
        options: Further ones of Muon.
    """
    group = {
        "params": list(params),
        "base": "muon",
        "blocks": tuple(matrix.grid for matrix in matrices),
        "transposed": True,
        **options,
    }
    return HybridOptimizer(
        [group], lr=LR, weight_decay=DECAY, eps=EPS, momentum=MOMENTUM, backend="triton",
        hybrid=HybridConfig(predictor="none"),
    )  # fmt: skip


def blocks_of_matrix(matrix: Matrix, whole: Tensor) -> list[Tensor]:
    """The blocks of a matrix, as views, row after row."""
    down, across = matrix.grid
    return [b for part in whole.chunk(down) for b in part.chunk(across, dim=1)]


def joined(matrix: Matrix, blocks: Sequence[Tensor]) -> Tensor:
    """The matrix of its blocks."""
    across = matrix.grid[1]
    rows = [torch.cat(list(blocks[i : i + across]), 1) for i in range(0, len(blocks), across)]
    return torch.cat(rows)


def stacked_step(weight: Tensor, gradient: Tensor, momentum: Tensor) -> None:
    """Muon in plain torch, for a stack of matrices of one shape.

    Args:
        weight: ``[matrices, rows, columns]``, updated in place.
        gradient: As `weight`.
        momentum: As `weight`, updated in place.
    """
    rows, columns = weight.shape[-2:]
    momentum.lerp_(gradient, 1 - MOMENTUM)
    update = gradient.lerp(momentum, MOMENTUM).bfloat16()
    x = update.mT if rows > columns else update
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for a, b, c in schedule(MUON_DEFAULTS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if rows > columns:
        x = x.mT
    scale = rate_scale("match_rms_adamw", rows, columns)
    weight.mul_(1 - LR * DECAY).add_(x, alpha=-LR * scale)


class Stacks:
    """Blocks of equal shape behind each other, as one tensor each.

    Args:
        matrices: The matrices.
        wholes: For each, its elements; they are copied.
    """

    def __init__(self, matrices: Sequence[Matrix], wholes: Sequence[Tensor]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for matrix, whole in zip(matrices, wholes):
            by_shape.setdefault(matrix.block, []).extend(blocks_of_matrix(matrix, whole))
        self.tensors = [torch.stack(blocks) for blocks in by_shape.values()]

    def blocks(self) -> list[Tensor]:
        """Every block, as a view."""
        return [block for tensor in self.tensors for block in tensor.unbind()]


class Contenders:
    """Every optimizer's step for the hidden matrices of one model.

    Weights and gradients are the same at first; none shares weights with ours, which would
    have to look at what others wrote. The compiled one gets its blocks stacked for nothing.

    Args:
        matrices: The matrices.
        device: Where.
        seed: Of weights and gradients.
        compiled: Whether the plain step is compiled.
    """

    def __init__(
        self, matrices: Sequence[Matrix], device: torch.device, seed: int, compiled: bool = True
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(size: float) -> list[Tensor]:
            return [
                torch.randn(m.shape, generator=generator, device=device).mul_(size)
                for m in matrices
            ]

        weights, gradients = normal(0.02), normal(1e-3)
        self.ours = parameters(weights, gradients)
        self.weights, stacked = Stacks(matrices, weights), Stacks(matrices, gradients)
        self.momenta = [torch.zeros_like(tensor) for tensor in self.weights.tensors]
        self.steps: dict[str, Step] = {OURS: hybrid_muon(self.ours, matrices).step}
        self.missing: dict[str, str] = {}
        build = torch_muon()
        if build is None:
            reason = f"torch {torch.__version__} has no torch.optim.Muon"
            self.missing = {TORCH_BLOCKS: reason, TORCH_WHOLE: reason}
        else:
            self.whole = parameters([weight.clone() for weight in weights], gradients)
            self.steps[TORCH_WHOLE] = build(self.whole).step
            params = parameters(self.weights.blocks(), stacked.blocks())
            self.steps[TORCH_BLOCKS] = build(params).step
        # Compiled anew for each model: shapes are constants then.
        torch._dynamo.reset()
        run = torch.compile(stacked_step, dynamic=False) if compiled else stacked_step

        @torch.no_grad()
        def plain() -> None:
            for each in zip(self.weights.tensors, stacked.tensors, self.momenta):
                run(*each)

        self.steps[COMPILED] = plain


def parameters(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters in the memory of values, with these gradients."""
    params = [nn.Parameter(value) for value in values]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    return params
