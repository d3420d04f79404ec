"""Newton-Schulz orthogonalisation in plain torch: the kernels' oracle, and the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.matrices import Block, Coefficients, MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.scalars import HYPER, Scalars

SMALLEST_NORM = 1e-30
"""Norms below it count as it, so that a matrix of zeros stays one also where eps is 0."""
GRAM_ASPECT = 2.0
"""Columns for each row from which on Gram matrices are multiplied instead. On one core three steps
take three quarters of the time at 3 and 0.6 of it at 4."""
MIX_GRADIENTS = 1000.0
"""Gradients until the slow EMA has its full part in the momentum; the part grows with their number.
All of it at once costs short runs 0.02 of the loss (``examples/benchmarks/EXPERIMENTS.md``)."""


def newton_schulz_torch(
    matrices: Tensor,
    coefficients: Coefficients,
    eps: float | Tensor = 1e-7,
    by_gram: bool = False,
) -> Tensor:
    """Orthogonalises a batch of matrices, in their dtype.

    Args:
        matrices: ``[..., rows, columns]``, of any floating dtype.
        coefficients: a, b, c of each step.
        eps: Least norm that a matrix is divided by; a tensor gives each matrix its own.
        by_gram: Whether wide ones in FP32 or more may be multiplied at the end only (`_by_gram`).

    Returns:
        As `matrices`, with singular values near one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    least = torch.as_tensor(eps, dtype=torch.float64, device=x.device).clamp(min=SMALLEST_NORM)
    wide = torch.promote_types(x.dtype, torch.float32)
    # Rounded as torch.optim.Muon does: later steps blow a difference of 0.2% up to 4%.
    norm = torch.linalg.matrix_norm(x, dtype=wide).to(x.dtype).to(wide)
    norm = torch.maximum(norm, least.to(wide)).to(x.dtype)
    x = x / norm[..., None, None]
    batch = x.reshape(-1, *x.shape[-2:])
    rows, columns = x.shape[-2:]
    if by_gram and x.dtype == wide and columns >= GRAM_ASPECT * rows:
        batch = _by_gram(batch, coefficients)
    else:
        for a, b, c in coefficients:
            gram = batch @ batch.mT
            batch = torch.baddbmm(batch, _polynomial(gram, b, c), batch, beta=a)
    result = batch.reshape(x.shape)
    return result.mT if tall else result


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    # With alpha=0 in BF16 on the CPU, torch 2.13's baddbmm forgets beta.
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram


def _by_gram(batch: Tensor, coefficients: Coefficients) -> Tensor:
    """The same by products of Gram matrices: that of X is P G P once X is P X.

    All are polynomials of the first, so they commute. 9 products of them and two with X for three
    steps, where the direct form has 3 and 6. Rounding builds up: three steps of FP32 end 6e-6 off
    where singular values fall as 1/i² (direct 2e-6), five steps 3e-4 (``gram_form.py``).
    """
    gram = batch @ batch.mT
    whole: Tensor | None = None
    for step, (a, b, c) in enumerate(coefficients, 1):
        factor = _polynomial(gram, b, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if step < len(coefficients):
            gram = factor @ gram @ factor
        whole = factor if whole is None else factor @ whole
    return batch if whole is None else whole @ batch


def orthogonalise_torch(
    matrices: MatrixSet, scalars: Scalars, clip: Tensor, skip: Tensor | None
) -> None:
    """`orthogonalise` in plain torch.

    ``clip`` is what clipping and the loss scale multiply the gradient with, 0-dim FP64; where
    ``skip`` is true (0-dim bool; None: it is not) ``exp_avg`` stays as it is.
    """
    momenta = momenta_torch(matrices.tensors, scalars, clip, skip)
    _orthogonalise(matrices, scalars, momenta, "update")


def orthogonalise_row_torch(matrices: MatrixSet, scalars: Scalars, row: str) -> None:
    """`orthogonalise_row` in plain torch."""
    _orthogonalise(matrices, scalars, dict(enumerate(matrices.tensors.flat[row])), row, True)


def momenta_torch(
    tensors: TensorSet, scalars: Scalars, clip: Tensor, skip: Tensor | None
) -> dict[int, Tensor]:
    """Moves ``exp_avg``; returns what is to be orthogonalised of each tensor with a gradient."""
    flat, compute = tensors.flat, tensors.compute_dtype
    rows = scalars.hyperparameters[tensors.group.long()]
    factors, rates = clip * rows[:, HYPER["sign"]], 1.0 - rows[:, HYPER["beta1"]]
    part = (scalars.ledger[INDEX["slow_count"]] / MIX_GRADIENTS).clamp(max=1.0)
    mixes = (part * rows[:, HYPER["slow_mix"]], rows[:, HYPER["nesterov_mix"]])
    table = torch.stack([factors, rates, *mixes], dim=1).to(compute)
    mixed = {}
    for index, here in enumerate(tensors.present):
        if not here:
            continue
        factor, rate, slow_mix, nesterov_mix = table[index].unbind()
        g = flat["grad"][index].to(compute) * factor
        m = flat["exp_avg"][index]
        moved = torch.lerp(m, g, rate)
        m.copy_(moved if skip is None else torch.where(skip, m, moved))
        mixed[index] = torch.lerp(g, moved, nesterov_mix)
        if tensors.has("slow_ema"):
            mixed[index].lerp_(flat["slow_ema"][index], slow_mix)
    return mixed


def _orthogonalise(
    matrices: MatrixSet,
    scalars: Scalars,
    sources: dict[int, Tensor],
    row: str,
    by_gram: bool = False,
) -> None:
    """Orthogonalises matrices in flat tensors to a row, all of one shape at a time."""
    tensors = matrices.tensors
    eps = scalars.hyperparameters[tensors.group.long(), HYPER["eps"]]
    for wave in matrices.waves:
        for alike in wave.by_shape.values():
            blocks = [block for block in alike if block.tensor in sources]
            if not blocks:
                continue
            which = [block.tensor for block in blocks]
            # Of 148 whole tensors of 8 x 8, a view of each took half of the time of a prediction.
            plain = all(block.whole and not block.tall for block in blocks)
            place = (lambda block, flat: flat) if plain else Block.view
            batch = torch.stack([place(block, sources[block.tensor]) for block in blocks])
            batch = batch.view(len(blocks), *blocks[0].shape).to(matrices.dtype)
            made = newton_schulz_torch(batch, wave.coefficients, eps[which], by_gram)
            goals = [place(block, tensors.flat[row][block.tensor]) for block in blocks]
            torch._foreach_copy_(goals, list((made.flatten(1) if plain else made).unbind()))
