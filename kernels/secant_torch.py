"""The passes of a quasi-Newton move in plain torch (see ``secant.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, PART_COLUMN
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet
from triton_hybrid.kernels.scalars import HYPER, Scalars
from triton_hybrid.kernels.together_torch import SHORT, Cells, cells_of, dots
from triton_hybrid.kernels.trial import LEAST_PAIRS

PART = 1 << 14
"""Elements of a long tensor that are worked on at a time: those of all pairs stay in cache."""


def settle_torch(tensors: TensorSet, scalars: Scalars, orders: Tensor, history: int) -> None:
    """`settle` in plain torch."""
    on_cpu = orders.device.type == "cpu"
    pair, restart, fraction, slot = orders.tolist() if on_cpu else orders.unbind()
    noted, placed = not on_cpu or bool(pair or restart), not on_cpu or fraction != 1.0
    if not noted and not placed:
        return
    pair, restart = pair > 0, restart > 0
    sign = scalars.hyperparameters[tensors.group.long(), HYPER["sign"]]
    factors = (sign / scalars.ledger[INDEX["loss_scale"]]).to(tensors.compute_dtype)
    parts = scalars.prediction[tensors.place, PART_COLUMN.value] > 0
    slots = [int(slot)] if on_cpu else range(history)
    known = factors.tolist() if on_cpu else factors
    keys = [*zip(tensors.present, parts.tolist(), known)] if on_cpu else [True] * len(tensors)
    for cells in cells_of(tensors, keys, PART):
        w, snapshot = cells.weight(), cells.joined("snapshot")
        here = tensors.present[cells.first]
        if noted:
            last = cells.joined("last_gradient")
            g = torch.zeros_like(last)
            if here:
                g = cells.joined("grad").to(last.dtype) * known[cells.first]
            moved, change = (w - snapshot, g - last) if here else (g, g)
            for number in slots:
                now = pair if on_cpu else pair & (slot == number)
                _note(cells, f"move_{number}", moved, now)
                _note(cells, f"change_{number}", change, now)
            snapshot = _note(cells, "snapshot", w, restart)
            _note(cells, "last_gradient", g, restart)
        if placed:
            share = torch.as_tensor(fraction, dtype=w.dtype, device=w.device)
            at = torch.where(share == 0.0, snapshot, snapshot + share * (w - snapshot))
            moves = cells.spread(parts) & (share != 1.0)
            cells.put_weight(torch.where(moves, at, w))


def _note(cells: Cells, name: str, value: Tensor, now: Any) -> Tensor:
    """Gives a row a value where ``now``, a bool on the CPU, holds; returns the row."""
    if now is False:
        return cells.joined(name)
    found = value if now is True else torch.where(now, value, cells.joined(name))
    cells.put(name, found)
    return found


def _remembered(g: Tensor, changes: Tensor, trial: Tensor) -> tuple[Tensor, Any]:
    """Mean square of the gradients of the pairs (``pairs.py``); whether there are enough."""
    on_cpu, history = trial.device.type == "cpu", len(changes)
    slot, pairs = trial[:2].tolist() if on_cpu else trial[:2].unbind()
    enough = pairs >= LEAST_PAIRS.value
    if enough is False:
        return g, enough
    count = int(pairs) if on_cpu else history
    back = torch.arange(1, count + 1, device=trial.device)
    before = g - changes[torch.remainder(slot - back, history).long()].cumsum(0)
    if not on_cpu:
        before = torch.where((back <= pairs).unsqueeze(1), before, 0.0)
    return before.square_().sum(0).addcmul_(g, g) / (pairs + 1.0), enough


def _metric(tensors: TensorSet, scalars: Scalars) -> Tensor:
    """FP64 ``[tensors, 8]``: the rule's numbers; rate; decay; bias correction; ε."""
    rule = tensors.rule
    assert rule is not None
    row = scalars.hyperparameters[tensors.group.long()]
    step = tensors.steps.double().clamp(min=1.0)
    lr = row[:, HYPER["lr"]]
    correction1 = 1.0 - (step * row[:, HYPER["log_exp_avg"]]).exp()
    decay = lr * row[:, HYPER["weight_decay"]]
    its = rule.torch_along.numbers(row, step)
    return torch.stack([*its, lr, decay, correction1, row[:, HYPER["eps"]]], dim=1)


def _blocks(
    tensors: TensorSet, scalars: Scalars, trial: Tensor, history: int
) -> Iterator[tuple[Cells, Tensor, Tensor, Tensor, dict[str, Tensor], Sequence[Any]]]:
    """Of elements with the same numbers: moves, changes, metric, rows; part, decay, correction.

    Floats on the CPU, else 0-dim.
    """
    rule, on_cpu = tensors.rule, scalars.ledger.device.type == "cpu"
    assert rule is not None
    table = _metric(tensors, scalars).to(tensors.compute_dtype)
    parts = scalars.prediction[tensors.place, PART_COLUMN.value] > 0
    numbers: Any = [row.unbind() for row in table.unbind()]
    keys: list[Any] = [True] * len(tensors)
    if on_cpu:
        numbers = [*map(tuple, table.tolist())]
        keys = [its if here else None for its, here in zip(numbers, parts.tolist())]
    names = [f"{kind}_{slot}" for kind in ("move", "change") for slot in range(history)]
    for cells in cells_of(tensors, keys, PART):
        a, b, c, d, lr, decay, correction1, eps = numbers[cells.first]
        rows = {name: cells.joined(name) for name in ("last_gradient", "exp_avg", "exp_avg_sq")}
        out = rows["exp_avg"].new_empty(2, cells.total)
        ones = torch.ones_like(out[0])
        metric = rule.torch_along.along(rows, ones, (a, b, c, d), out).mul_(lr)
        here: Any = 1.0 if on_cpu else parts[cells.first]
        moves, changes = cells.stacked(names).split(history)
        square, known = _remembered(rows["last_gradient"], changes, trial)
        if known is not False:
            metric = torch.where((square > 0) & known, lr / (square.sqrt() + eps), metric)
        yield cells, moves, changes, metric * here, rows, (here, decay, correction1)


Blocks = list[tuple[Cells, Tensor, Tensor, Tensor, dict[str, Tensor], Sequence[Any]]]


def products_torch(
    tensors: TensorSet, scalars: Scalars, trial: Tensor, out: Tensor, history: int
) -> Blocks | None:
    """`products` in plain torch; returns what `move_torch` need not find again of short tensors."""
    blocks = _blocks(tensors, scalars, trial, history)
    few = max(tensors.lengths) <= SHORT and sum(tensors.lengths) <= TORCH_BLOCK
    known = [*blocks] if few else None  # of many it would be another copy of all pairs
    for cells, moves, changes, metric, rows, others in known or blocks:
        here, decay, correction1 = others
        if isinstance(here, Tensor):
            moves, changes = moves * here, changes * here
        g, average = rows["last_gradient"], rows["exp_avg"]
        left, right = torch.cat([moves, changes * metric]), torch.cat([changes, g.unsqueeze(0)])
        # Where the rate is 0 nothing moves.
        squares = (moves.square() / torch.where(metric > 0, metric, 1.0)).sum(1)
        rest = [
            (metric * g).dot(g),
            (metric * average).dot(average) / correction1**2,
            decay * g.dot(cells.weight()) * here,
        ]
        out += torch.cat([(left @ right.T).flatten(), squares, torch.stack(rest)]).double()
    return known


def move_torch(
    tensors: TensorSet,
    scalars: Scalars,
    trial: Tensor,
    solution: Tensor,
    history: int,
    known: Blocks | None = None,
) -> None:
    """`move` in plain torch."""
    on_cpu = solution.device.type == "cpu"
    sums = scalars.sums[tensors.place].zero_()
    moving = solution[0] > 0
    if on_cpu and not bool(moving):
        return
    _, gamma, share, *_ = solution.to(tensors.compute_dtype).unbind()
    alpha, delta = solution[3:].to(tensors.compute_dtype).split(history)
    for cells, moves, changes, metric, rows, others in known or _blocks(
        tensors, scalars, trial, history
    ):
        here, decay, _ = others
        g, w = rows["last_gradient"], cells.weight()
        moved = -gamma * metric * (g - alpha @ changes) - delta @ moves - share * decay * w
        moves_here = rows["exp_avg_sq"] != 0
        if not on_cpu:
            moves_here &= moving & here
        moved = torch.where(moves_here, moved, 0.0)
        seen = cells.put_weight(torch.where(moves_here, w + moved, w))
        squares = torch.where(moves_here, moved * moved / metric, 0.0)
        total = sums[cells.indices]
        total[:, 0] += dots(cells.parts(g), cells.parts(moved))
        total[:, 1] += torch.stack([*map(torch.sum, cells.parts(squares))])
        # A finite sum has finite terms; on the CPU the second look costs only when not.
        if not on_cpu or not bool(seen.sum(dtype=tensors.compute_dtype).isfinite()):
            total[:, 2] += torch.stack([~part.isfinite().all() for part in cells.parts(seen)])
        sums[cells.indices] = total
