"""The numbers that the launches of one device share, in device memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import INTERPRETED
from triton_hybrid.kernels.ledger import FOUND_INF, HOLD, LOSS_SCALE, new_ledger
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import number
from triton_hybrid.kernels.sums import column_total

HYPER: dict[str, int] = {}
"""Columns of the table of hyperparameters, by name."""
_column = functools.partial(number, HYPER)
LR = _column("lr")
BETA1 = _column("beta1")  # of a Muon group the decay of its momentum
BETA2 = _column("beta2")
LOG_EXP_AVG = _column("log_exp_avg")  # logarithm of the decay of exp_avg
LOG_BETA2 = _column("log_beta2")
EPS = _column("eps")
WEIGHT_DECAY = _column("weight_decay")
SIGN = _column("sign")  # -1 when maximising
STEPS_AHEAD = _column("horizon")  # base steps that one predicted step stands for
NESTEROV_MIX = _column("nesterov_mix")  # weight of Muon's momentum against the gradient
SLOW_MIX = _column("slow_mix")  # weight of the slow EMA beside both
HYPER_COLUMNS = tl.constexpr(len(HYPER))

UPDATE_SUMS = 4
"""Sums of an update: its square, its product with the slow direction, the squared slow direction,
the squared slow EMA."""

MOVE_COLUMNS = 6
"""Columns of the table of moves: the factor of the displacement that stands; the same while a
prediction is being added to it; the four numbers of the rule's denominator."""


class Scalars:
    """Tables, sums and scratch for the tensor sets of one device.

    Each set is told which rows of the per-tensor tables, and which columns of the first-stage
    sums, are its own.

    Args:
        sets: The tensor sets whose gradients are clipped and checked together.
        groups: How many parameter groups there are.
    """

    __slots__ = ("__dict__", "device", "launches")  # all other attributes are tensors
    device: torch.device
    launches: dict[Any, Any]
    """What `repeated` has prepared with these."""

    def __init__(self, sets: Sequence[TensorSet], groups: int = 1) -> None:
        self.device = device = sets[0].device
        count = programs = 0
        for tensors in sets:
            tensors.place = slice(count, count + len(tensors))
            tensors.first_column = programs
            count += len(tensors)
            programs += tensors.tiling.programs
        self.hyperparameters = torch.zeros(groups, len(HYPER), dtype=torch.float64, device=device)
        self.ledger = new_ledger(device)
        # FP32: factor, slope, fraction, part and fingerprint of each tensor.
        start = [[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]] * count
        self.prediction = torch.tensor(start, dtype=torch.float32, device=device)
        self.moves = torch.zeros(count, MOVE_COLUMNS, dtype=torch.float64, device=device)
        """What the displacement that stands is made of, where it is computed again (`residue`)."""
        self.sums = torch.zeros(count, 3, dtype=torch.float64, device=device)
        """What a kernel measured of each tensor."""
        columns = triton.next_power_of_2(programs)
        self.partials = torch.zeros(2 + UPDATE_SUMS, columns, dtype=torch.float32, device=device)
        """FP32, first-stage sums of each program: squared gradient, non-finite gradients, and those
        of an update."""
        self.gradient = torch.zeros(2, dtype=torch.float64, device=device)
        """FP64: sum of the squares of all gradients as they came, and more than 0 where one of them
        is not finite."""
        self.found = torch.zeros(count, dtype=torch.int64, device=device)
        """Fingerprints as they are summed up; zero between launches."""
        self.arrivals = torch.zeros(2, dtype=torch.int32, device=device)
        """Counters of programs; zero between launches."""
        self.launches = {}


def own(table: Tensor, tensors: TensorSet) -> Tensor:
    """The rows of a per-tensor table that are a set's."""
    return table if table.shape[0] == len(tensors) else table[tensors.place]


@triton.jit
def precise_sqrt(x):
    """Square root, correctly rounded."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


def precise_sqrt_torch(x: Tensor, out: Tensor) -> Tensor:
    """`precise_sqrt` in plain torch, to the bit.

    Torch's own on the CPU is not: one bit off for one number in five (2.13). Where no kernel runs
    beside it that changes nothing; where one is interpreted, numpy's is taken, as there.
    """
    if INTERPRETED and x.device.type == "cpu":
        import numpy

        numpy.sqrt(x.numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)


@triton.jit
def precise_div(x, y):
    """Quotient, correctly rounded."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def gradient_norm(partials, ledger, max_norm, CLIP: tl.constexpr, COLUMNS: tl.constexpr):
    """Norm of all gradients, whether one is not finite, and what follows from it.

    Which is: whether the update is made, what clips the gradient, and what undoes the loss scale.
    """
    unscale = 1.0 / tl.load(ledger + LOSS_SCALE)
    norm = tl.sqrt(column_total(partials, 0, COLUMNS)) * unscale
    nonfinite = (column_total(partials, 1, COLUMNS) > 0) | (tl.load(ledger + FOUND_INF) > 0)
    applied = (nonfinite == 0) & (tl.load(ledger + HOLD) <= 0)
    clip = tl.minimum(max_norm / (norm + 1e-6), 1.0) if CLIP else 1.0
    return norm, nonfinite, applied, clip, unscale
