"""The passes of a quasi-Newton move in plain torch (see ``secant.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, PART_COLUMN
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.scalars import HYPER, Scalars

PART = 1 << 14
"""Elements of all pairs that are worked on at a time: they stay in cache."""


def assign(target: Tensor, value: Tensor, where: Any) -> None:
    """Copies where a condition holds, a bool on the CPU and a 0-dim tensor elsewhere."""
    if where is True:
        target.copy_(value)
    elif where is not False:
        target.copy_(torch.where(where, value, target))


def settle_torch(tensors: TensorSet, scalars: Scalars, orders: Tensor, history: int) -> None:
    """`settle` in plain torch."""
    on_cpu = orders.device.type == "cpu"
    pair, restart, fraction, slot = orders.tolist() if on_cpu else orders.unbind()
    if on_cpu and not pair and not restart and fraction == 1.0:
        return
    pair, restart = pair > 0, restart > 0
    sign = scalars.hyperparameters[tensors.group.long(), HYPER["sign"]]
    factors = (sign / scalars.ledger[INDEX["loss_scale"]]).to(tensors.compute_dtype)
    parts = scalars.prediction[tensors.place, PART_COLUMN.value] > 0
    for index, here in enumerate(tensors.present):
        for part in tensors.torch_blocks(index):
            w = tensors.weight(index, part)
            flat = tensors.flat
            snapshot, last = flat["snapshot"][index][part], flat["last_gradient"][index][part]
            if not (on_cpu and not pair and not restart):
                g = torch.zeros_like(last)
                if here:
                    g = flat["grad"][index][part].to(last.dtype) * factors[index]
                moved = w - snapshot if here else g
                change = g - last if here else g
                for number in range(history):
                    now = pair and slot == number if on_cpu else pair & (slot == number)
                    if now is not False:
                        assign(flat[f"move_{number}"][index][part], moved, now)
                        assign(flat[f"change_{number}"][index][part], change, now)
                assign(snapshot, w, restart)
                assign(last, g, restart)
            if not (on_cpu and fraction == 1.0):
                share = torch.as_tensor(fraction, device=w.device).to(w.dtype)
                placed = torch.where(share == 0.0, snapshot, snapshot + share * (w - snapshot))
                w.copy_(torch.where(parts[index] & (share != 1.0), placed, w))
                tensors.put_weight(index, part, w)


def _metric(tensors: TensorSet, scalars: Scalars) -> tuple[Tensor, ...]:
    """FP64 columns ``[tensors]``: the rule's numbers; rate; decay; bias correction."""
    rule = tensors.rule
    assert rule is not None
    row = scalars.hyperparameters[tensors.group.long()]
    step = tensors.steps.double().clamp(min=1.0)
    lr = row[:, HYPER["lr"]]
    correction1 = 1.0 - (step * row[:, HYPER["log_exp_avg"]]).exp()
    decay = lr * row[:, HYPER["weight_decay"]]
    return *rule.torch_along.numbers(row, step), lr, decay, correction1


def _blocks(
    tensors: TensorSet, scalars: Scalars, history: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, dict[str, Tensor], Tensor, Any]]:
    """Of each block: moves, changes, metric, rows, weights; place, part, decay, correction."""
    rule, on_cpu = tensors.rule, scalars.ledger.device.type == "cpu"
    assert rule is not None
    table = torch.stack(_metric(tensors, scalars), dim=1).to(tensors.compute_dtype)
    numbers = table.tolist() if on_cpu else [row.unbind() for row in table.unbind()]
    parts = scalars.prediction[tensors.place, PART_COLUMN.value] > 0
    takes_part = parts.tolist() if on_cpu else parts
    names = [[f"{kind}_{slot}" for slot in range(history)] for kind in ("move", "change")]
    scratch = torch.empty(2, PART, dtype=tensors.compute_dtype, device=tensors.device)
    for index, here in enumerate(takes_part):
        a, b, c, d, lr, *others = numbers[index]
        for begin in range(0, tensors.lengths[index], PART) if not on_cpu or here else ():
            part = slice(begin, min(begin + PART, tensors.lengths[index]))
            w = tensors.weight(index, part)
            rows = tensors.block_rows(index, part, ("last_gradient", "exp_avg", "exp_avg_sq"))
            ones = torch.ones_like(w)
            out = scratch[:, : w.numel()]
            metric = rule.torch_along.along(rows, ones, (a, b, c, d), out).mul_(lr)
            if not on_cpu:
                metric = metric * here
            moves, changes = (
                torch.stack([tensors.flat[name][index][part] for name in its]) for its in names
            )
            yield index, moves, changes, metric, rows, w, (part, here, *others)


def products_torch(tensors: TensorSet, scalars: Scalars, out: Tensor, history: int) -> None:
    """`products` in plain torch."""
    gram = torch.zeros(2 * history, history + 1, dtype=torch.float64, device=tensors.device)
    squares = torch.zeros(history, dtype=torch.float64, device=tensors.device)
    rest = torch.zeros(3, dtype=torch.float64, device=tensors.device)
    for _, moves, changes, metric, rows, w, others in _blocks(tensors, scalars, history):
        _, here, decay, correction1 = others
        if here is not True:
            moves, changes = moves * here, changes * here
        g = rows["last_gradient"]
        left, right = torch.cat([moves, changes * metric]), torch.cat([changes, g.unsqueeze(0)])
        gram += (left @ right.T).double()
        # Where the rate is 0 nothing moves.
        squares += (moves.square() / torch.where(metric > 0, metric, 1.0)).sum(1)
        rest[0] += (metric * g).dot(g)
        rest[1] += (metric * rows["exp_avg"]).dot(rows["exp_avg"]) / correction1**2
        rest[2] += decay * g.dot(w) * here
    out += torch.cat([gram.flatten(), squares, rest])


def move_torch(tensors: TensorSet, scalars: Scalars, solution: Tensor, history: int) -> None:
    """`move` in plain torch."""
    on_cpu = solution.device.type == "cpu"
    sums = scalars.sums[tensors.place].zero_()
    moving = solution[0] > 0
    if on_cpu and not bool(moving):
        return
    _, gamma, share, *_ = solution.to(tensors.compute_dtype).unbind()
    alpha, delta = solution[3:].to(tensors.compute_dtype).split(history)
    for index, moves, changes, metric, rows, w, others in _blocks(tensors, scalars, history):
        part, here, decay, _ = others
        g = rows["last_gradient"]
        moved = -gamma * metric * (g - alpha @ changes) - delta @ moves - share * decay * w
        moves_here = (rows["exp_avg_sq"] != 0) & moving & here
        moved = torch.where(moves_here, moved, 0.0)
        w.copy_(torch.where(moves_here, w + moved, w))
        tensors.put_weight(index, part, w)
        seen = tensors.flat["param"][index][part] if tensors.has_master else w
        sums[index, 0] += g.dot(moved)
        sums[index, 1] += torch.where(moves_here, moved * moved / metric, 0.0).sum()
        sums[index, 2] += ~seen.isfinite().all()
