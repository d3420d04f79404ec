"""Is training deterministic? Where it is, the trapezoid of two slopes is the change of the loss.

A base step leads by s from weights with loss l0 and gradient g0 to others with loss l1 and gradient
g1. But for terms of third order, l1 - l0 = ½ (g0 + g1)·s; with other data, or another dropout mask,
for the second loss and gradient, it is not. Nothing is kept for it: s follows from the weights and
the moments after the step, in a pass after it (with g0) and in one before the next (with g1), each
of which reads 16 bytes a parameter in FP32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, LOSS_SCALE
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import EXP_AVG, GRAD, TAIL_SHARE, load_row, load_weight
from triton_hybrid.kernels.running import SLOWEST_RATE
from triton_hybrid.kernels.scalars import HYPER, HYPER_COLUMNS, LR, SIGN, WEIGHT_DECAY, Scalars
from triton_hybrid.kernels.sums import fold, no_sums, reduce_partials
from triton_hybrid.kernels.together_torch import together

WATCH = ("quiet_share", "quiet_steps", "looked_at", "step_loss", "step_slope", "step_number")
"""Entries of a watch: the share of steps that the trapezoid explained, how many it was asked of,
and how many were looked at, with a loss or without; loss and slope at the beginning of the last
step, and the number of the one before."""

OF_BEND, OF_CHANGE, ROUNDING = 0.05, 0.003, 1e-6
"""Part of the trapezoid's second order, ½ (g1 - g0)·s, and of itself, up to which it may be wrong;
part of the loss that is rounding. In full batch (four tasks, five rates, 220 steps) 46% or more of
the first 24 steps were within that, and 85% or more of the later ones. With dropout of 0.02 or 0.1,
or batches of 64 to 1,350 of 1,400 examples, 35% of the first 24 at most, and 11% of the later ones.
Measured by itself alone it would not tell them apart early, where noise hides in steep falls."""


def new_watch(device: torch.device, values: Mapping[str, float] | None = None) -> Tensor:
    """A watch with the given entries; FP64 ``[len(WATCH)]``."""
    known = {"step_loss": math.nan, "step_slope": math.nan, **(values or {})}
    entries = [float(known.get(name, 0.0)) for name in WATCH]
    return torch.tensor(entries, dtype=torch.float64, device=device)


def begin_step(watch: Tensor, ledger: Tensor) -> None:
    """Notes with which loss a base step begins, and what number the one before had."""
    watch[WATCH.index("step_loss")] = ledger[INDEX["loss"]]
    watch[WATCH.index("step_number")] = ledger[INDEX["applied"]]


def end_step(watch: Tensor, ledger: Tensor, slope: Tensor) -> None:
    """Notes the slope g0·s along the base step just made, if it was made."""
    made = ledger[INDEX["applied"]] > watch[WATCH.index("step_number")]
    watch[WATCH.index("step_slope")] = torch.where(made, slope, torch.nan)


def compare(watch: Tensor, ledger: Tensor, after: Tensor) -> None:
    """Compares the trapezoid of the last base step with the change of the loss.

    Args:
        watch: FP64, changed in place.
        ledger: FP64, with the loss that belongs to the gradient at hand.
        after: The slope g1·s; FP64, 0-dim.
    """
    its = dict(zip(WATCH, watch.unbind()))
    trapezoid, bend = 0.5 * (its["step_slope"] + after), 0.5 * (after - its["step_slope"])
    error = (ledger[INDEX["loss"]] - its["step_loss"] - trapezoid).abs()
    allowed = torch.maximum(OF_BEND * bend.abs(), OF_CHANGE * trapezoid.abs())
    # Of several ranks, one alone may see that the gradient is not finite; this all of them know.
    known, steps = error.isfinite() & (ledger[INDEX["found_inf"]] == 0), its["quiet_steps"]
    quiet = error <= allowed + ROUNDING * its["step_loss"].abs()
    rate = (1.0 / (steps + 1.0)).clamp(min=SLOWEST_RATE.value) * known
    its["quiet_share"] = its["quiet_share"] + rate * (quiet.double() - its["quiet_share"])
    its["quiet_steps"], its["looked_at"] = steps + known, its["looked_at"] + 1.0
    watch.copy_(torch.stack(list(its.values())))


@triton.jit
def _slope_chunk(
    addresses, tensor, start, length, row, step,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    lr = tl.load(row + LR)
    decay = (lr * tl.load(row + WEIGHT_DECAY)).to(STATE)
    size, a, b, c, d = CONSTANTS(row, step, lr, STATE)
    slope = no_sums(BLOCK, FULL)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL)
        m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
        moved = ALONG(addresses, tensor, begin, length, m, denominator, STATE, BLOCK, FULL)
        slope += fold(g * (size * moved + decay * w), BLOCK, FULL)
    return tl.sum(slope, axis=0)


@triton.jit
def _slope_kernel(
    addresses, extents, places, n_chunks, group, rates, steps, ledger, partials,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    unscale = 1.0 / tl.load(ledger + LOSS_SCALE)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        row = rates + tl.load(group + tensor) * HYPER_COLUMNS
        step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
        slope = tl.full((), 0.0, tl.float32)
        for FULL in tl.static_range(2):
            if full == FULL:
                slope = _slope_chunk(
                    addresses, tensor, start, length, row, step, CONSTANTS, DENOMINATOR, ALONG,
                    PARAM_TYPE, GRAD_TYPE, STATE, KEPT,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        kept = 1.0 - tl.load(row + LR) * tl.load(row + WEIGHT_DECAY)
        factor = -(unscale * tl.load(row + SIGN) / kept).to(tl.float32)
        tl.store(partials + chunk, slope * factor)


def base_slope(tensors: TensorSet, scalars: Scalars, rates: Tensor) -> Tensor:
    """Slope of the gradient along the last base step, with its weight decay. Two launches.

    With the update u = size · exp_avg / denominator and the decay d = lr · weight_decay, the step
    led from (w + u) / (1 - d) to w, so it was -(u + d w) / (1 - d).

    Args:
        tensors: With rows ``grad``, ``weight`` and those of their rule, as the step left them;
            those without a gradient add nothing.
        scalars: Of these tensors.
        rates: The table of hyperparameters that the step was made with.

    Returns:
        FP64, 0-dim.
    """
    rule, chunks = tensors.rule, tensors.chunks()
    assert rule is not None
    partials = tensors.room_for(1)
    tensors.launch(
        _slope_kernel, tensors.group, rates, tensors.steps, scalars.ledger, partials,
        CONSTANTS=rule.constants, DENOMINATOR=rule.denominator, ALONG=rule.along,
        GRAD_TYPE=tensors.dtype_of("grad"),
    )  # fmt: skip
    sums = torch.zeros(len(tensors), 1, dtype=torch.float64, device=tensors.device)
    reduce_partials(partials, chunks, sums)
    return sums.sum()


def base_slope_torch(tensors: TensorSet, scalars: Scalars, rates: Tensor) -> Tensor:
    """`base_slope` in plain torch."""
    rule, compute = tensors.rule, tensors.compute_dtype
    assert rule is not None
    hyper = rates[tensors.group.long()]
    its = dict(zip(HYPER, hyper.unbind(1)))
    step = tensors.steps.double().clamp(min=1.0)
    decay = its["lr"] * its["weight_decay"]
    size = its["lr"] / (1.0 - (step * its["log_exp_avg"]).exp())
    factor = -its["sign"] / scalars.ledger[INDEX["loss_scale"]] / (1.0 - decay)
    table = torch.stack([*rule.torch_along.numbers(hyper, step), size, decay, factor], 1)
    on_host = tensors.device.type == "cpu"
    numbers = table.tolist() if on_host else [row.unbind() for row in table.to(compute).unbind()]
    scratch = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
    names = ("exp_avg", *rule.reads_along)
    total = torch.zeros((), dtype=torch.float64, device=tensors.device)

    def add(index: int, w: Tensor, g: Tensor, rows: Mapping[str, Tensor]) -> None:
        *its, size, decay, factor = numbers[index]
        out = scratch[:, : w.numel()]
        moved = rule.torch_along.along(rows, rows["exp_avg"], its, out).mul_(size)
        total.add_(g.to(compute).dot(moved.add_(decay * w)).double() * factor)

    keys = [tuple(row) if on_host and here else None for here, row in zip(tensors.present, numbers)]
    done: set[int] = set()
    for first, party in together(tensors, keys).items():
        rows = {name: party.joined(name) for name in names}
        add(first, party.weight(), party.joined("grad"), rows)
        done.update(party.members)
    for index, here in enumerate(tensors.present):
        for part in tensors.torch_blocks(index) if here and index not in done else ():
            rows = tensors.block_rows(index, part, names)
            add(index, tensors.weight(index, part), tensors.flat["grad"][index][part], rows)
    return total
