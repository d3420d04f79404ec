"""The base step in plain torch, block by block in cache: the CPU backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger_torch import (
    count,
    entries_of,
    move_loss_scale_torch,
    observe_torch,
    slow_decay_torch,
    slow_share_torch,
)
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet
from triton_hybrid.kernels.placement import Places, placed_by_update
from triton_hybrid.kernels.rows import OWN
from triton_hybrid.kernels.scalar_math import (
    Number,
    Truth,
    beside,
    clamp,
    finite,
    negate,
    number,
    numbers_of,
    reciprocal,
    sqrt,
    vector_of,
    where,
    write,
)
from triton_hybrid.kernels.scalars import HYPER, UPDATE_SUMS, Scalars
from triton_hybrid.kernels.together_torch import Cells, cells_of, dots
from triton_hybrid.kernels.update_rule import Block, Numbers


def step_torch(
    sets: Sequence[TensorSet],
    scalars: Scalars,
    *,
    max_norm: float | None,
    slow_beta: float,
    observed: bool,
    measured: bool = True,
    cooperative: bool | None = None,
    known: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
    again: Sequence[Displacement] | None = None,
) -> None:
    """`step` in plain torch.

    On a GPU it does not wait for the device either: a skipped step is written back as it was. On
    the CPU it returns early instead.
    """
    ledger = scalars.ledger
    if not known:
        measure_torch(sets, scalars)
    gradient = Gradient.of(scalars, max_norm)
    _, _, applied, coefficient, unscale = gradient
    on_cpu = ledger.device.type == "cpu"

    rates = None
    if slow_beta > 0:
        rates = averaging_rates(ledger, slow_beta, gradient.norm, coefficient)
    measured = measured and rates is not None
    sums = torch.zeros(UPDATE_SUMS, dtype=torch.float64, device=ledger.device)
    skip = None if on_cpu else ~applied
    if applied is not False:
        for index, tensors in enumerate(sets):
            compared = measured and not tensors.frozen
            clip = torch.as_tensor(coefficient * unscale, dtype=torch.float64, device=ledger.device)
            assert tensors.rule is not None
            if tensors.rule.prepare_torch is not None:
                tensors.rule.prepare_torch(tensors, scalars, clip, skip)
            table = update_numbers(tensors, scalars, clip)
            part = 1.0 if reduce is None else tensors.share
            places = None
            if again is not None and placed_by_update(tensors):
                places = Places(tensors, scalars, again[index])
            own = rates if tensors.has("slow_ema") else None
            sums += part * _update(tensors, table, skip, own, measured, compared, places)
            here: float | Tensor = 1.0
            if not all(tensors.present):
                here = torch.tensor(tensors.present, device=ledger.device)
            tensors.steps.add_(here if on_cpu else applied.float() * here)

    if measured and reduce is not None:
        sums = reduce(sums)
    close_step_torch(
        ledger, gradient, sums, None if rates is None else rates[1], slow_beta, observed, measured
    )


class Gradient(NamedTuple):
    """What the gradients of a step have in common."""

    norm: Number  # of all, without the loss scale
    nonfinite: Truth
    applied: Truth  # whether the update is made
    coefficient: Number  # what clips them
    unscale: Number  # what undoes the loss scale

    @classmethod
    def of(cls, scalars: Scalars, max_norm: float | None) -> Gradient:
        """From ``scalars.gradient`` and the ledger."""
        entries, (square, bad) = entries_of(scalars.ledger), numbers_of(scalars.gradient)
        unscale = reciprocal(entries["loss_scale"])
        norm = sqrt(square) * unscale
        nonfinite = (bad > 0) | (entries["found_inf"] > 0)
        applied = negate(nonfinite | (entries["hold"] > 0))
        coefficient = beside(norm, 1.0)
        if max_norm is not None:
            coefficient = clamp(max_norm * reciprocal(norm + 1e-6), most=1.0)
        return cls(norm, nonfinite, applied, coefficient, unscale)


def close_step_torch(
    ledger: Tensor,
    gradient: Gradient,
    sums: Tensor,
    steady: Tensor | None,
    slow_beta: float,
    observed: bool,
    measured: bool,
) -> None:
    """Counts a step, takes it into the running statistics, and makes room for the next gradient.

    ``sums``: what `UPDATE_SUMS` names; ``steady``: what the slow EMA took of the gradient, None: 1.
    """
    norm, nonfinite, applied, coefficient, _ = gradient
    entries = entries_of(ledger)
    entries["norm"] = where(nonfinite, entries["norm"], norm)
    entries["nonfinite"] = nonfinite * beside(norm, 1.0)
    count(entries, skipped=nonfinite, applied=applied)
    if observed:
        used = norm * coefficient
        # A norm that overflowed would spoil every running mean for good.
        seen = applied & finite(used)
        used = used if steady is None else used * number(steady)
        observe_torch(entries, norm, used, numbers_of(sums), slow_beta, seen, measured)
    for name, value in (("loss", math.nan), ("hold", 0.0), ("found_inf", 0.0)):
        entries[name] = beside(norm, value)
    move_loss_scale_torch(entries, nonfinite)
    write(ledger, entries)


def measure_torch(sets: Sequence[TensorSet], scalars: Scalars) -> None:
    """`measure` in plain torch."""
    grads: list[Tensor] = []
    squares: list[Tensor] = []
    for tensors in sets:
        here = [g for g in tensors.flat["grad"] if g.numel()]
        if here:
            wide = torch.float64 if here[0].dtype == torch.float64 else torch.float32
            norms = torch.stack(torch._foreach_norm(here, 2, wide)).double()
            squares.append(norms.square() * tensors.share)
            grads.extend(here)
    total, bad = scalars.gradient.zero_().unbind()
    if squares:
        total.copy_(torch.cat(squares).sum())
    # An infinite sum of squares of finite values is an overflow, not a non-finite gradient.
    if grads and (total.device.type != "cpu" or not bool(total.isfinite())):
        bad.copy_(~torch.stack([g.isfinite().all() for g in grads]).all())


def averaging_rates(ledger: Tensor, slow_beta: float, norm: Number, coefficient: Number) -> Tensor:
    """FP64 ``[2]``: rate of the slow EMA, factor on its gradient."""
    entries = entries_of(ledger)
    share = slow_share_torch(entries, number(norm), number(coefficient))
    return vector_of([1.0 - slow_decay_torch(entries, slow_beta), share], ledger.device)


def update_numbers(tensors: TensorSet, scalars: Scalars, clip: Tensor) -> Tensor:
    """FP64 ``[tensors, len(Numbers)]``: the `Numbers` of each tensor."""
    hyper = dict(zip(HYPER, scalars.hyperparameters[tensors.group.long()].unbind(dim=1)))
    rate = hyper["lr"] * (1.0 if tensors.rate_factors is None else tensors.rate_factors)
    step = tensors.steps.double() + 1.0
    numbers = Numbers(
        clip=clip * hyper["sign"],
        decay=1.0 - hyper["lr"] * hyper["weight_decay"],
        beta1=hyper["beta1"],
        beta2=hyper["beta2"],
        rate1=1.0 - hyper["beta1"],
        rate2=1.0 - hyper["beta2"],
        root_correction2=(1.0 - (step * hyper["log_beta2"]).exp()).sqrt(),
        eps=hyper["eps"],
        size=rate / (1.0 - (step * hyper["log_exp_avg"]).exp()),
        lr=rate,
        weight_decay=hyper["weight_decay"],
    )
    return torch.stack(list(numbers), dim=1)


def _update(
    tensors: TensorSet,
    table: Tensor,
    skip: Tensor | None,
    rates: Tensor | None,
    measured: bool,
    compared: bool,
    places: Places | None = None,
) -> Tensor:
    """Updates one set, where ``skip`` is not true; returns what `UPDATE_SUMS` names.

    ``places``: where its weights are to begin, if not where they are.

    Blocks stay in cache, so what follows the rule's update costs no main memory.
    """
    on_host, compute = skip is None, tensors.compute_dtype
    numbers = table.tolist() if on_host else [r.unbind() for r in table.to(compute).unbind()]
    known: Any = None
    if rates is not None:
        known = rates.tolist() if on_host else rates.to(compute).unbind()
    scratch = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
    after = tensors.steps + 1.0
    totals = torch.zeros(len(tensors), UPDATE_SUMS, dtype=torch.float64, device=table.device)
    keys = [tuple(row) if here else None for here, row in zip(tensors.present, numbers)]
    for cells in cells_of(tensors, keys):
        its = Numbers(*numbers[cells.first])
        # Before anything is updated: displacements are made of the rows as they were.
        weight = None if places is None else places.weights(cells)
        total = totals[cells.indices]
        _update_cells(
            cells, its, after, scratch, skip, known, total if measured else None, compared, weight
        )
        totals[cells.indices] = total
    if not on_host:
        return totals.sum(0)
    sums = [0.0] * UPDATE_SUMS
    for row in totals.tolist() if measured else ():  # in the order of tensors
        sums = [total + term for total, term in zip(sums, row)]
    return torch.tensor(sums, dtype=torch.float64, device=table.device)


def _update_cells(
    cells: Cells,
    its: Numbers,
    after: Tensor,
    scratch: Tensor,
    skip: Any,
    rates: Any,
    sums: Tensor | None,
    compared: bool,
    weight: Tensor | None,
) -> None:
    """`_update` of elements with the same numbers.

    ``sums``: FP64 ``[tensors, UPDATE_SUMS]``, added to, where they are wanted; ``weight``: theirs,
    where it is not the one that is kept.
    """
    tensors, rule = cells.tensors, cells.tensors.rule
    assert rule is not None
    lists = rule.torch.takes_lists and skip is None
    in_place = lists and tensors.kept == OWN and not tensors.has_master
    if weight is None and not in_place:
        weight = cells.weight()
    clipped = skip is not None or its.clip != 1.0
    g: Any = None
    if clipped or rates is not None or not lists or tensors.dtype["grad"] != tensors.compute_dtype:
        g = cells.joined("grad").to(tensors.compute_dtype)
        g = g * its.clip if clipped else g
    slow = ["slow_ema"] * (rates is not None)
    ahead = cells.joined("exp_avg").clone() if compared and not slow else None
    if lists:
        weights = cells.rows("weight") if weight is None else cells.parts(weight)
        grads = cells.rows("grad") if g is None else cells.parts(g)
        moments = {name: cells.rows(name) for name in rule.writes}
        steps = [*after[cells.indices].unbind()]
        rule.torch.update(Block(weights, grads, moments, its, steps, scratch))
    names = slow if lists and not compared else [*rule.reads, *slow]
    rows = {name: cells.joined(name) for name in names}
    if ahead is not None:
        rows["slow_ema"] = ahead
    changed = [*slow] if lists else [*rule.writes, *slow]
    block = Block(weight, g, rows, its, None, scratch[:, : cells.total])
    before = {name: rows[name].clone() for name in changed} if skip is not None else {}
    old = weight.clone() if weight is not None and skip is not None else None
    if not lists:
        rule.torch.update(block)
    if compared and sums is not None:
        update, ahead, square = rule.torch_along.compare(block)
        updates, aheads = cells.parts(update), cells.parts(ahead)
        for place, pair in enumerate(((updates, updates), (updates, aheads), (aheads, aheads))):
            sums[:, place] += square * dots(*pair).double()
    if rates is not None:
        (slow_rate, steady), s = rates, rows["slow_ema"]
        if skip is None:
            s.mul_(1.0 - slow_rate).add_(g, alpha=slow_rate * steady)
        else:
            s.add_(slow_rate * (steady * g - s))
        if sums is not None:
            sums[:, 3] += dots(cells.parts(s), cells.parts(s))
    for name in changed:
        cells.put(name, rows[name] if skip is None else torch.where(skip, before[name], rows[name]))
    if weight is not None:
        cells.put_weight(weight if old is None else torch.where(skip, old, weight))
