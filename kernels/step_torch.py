"""The base step in plain torch, block by block in cache: the CPU backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.ledger_torch import (
    move_loss_scale_torch,
    observe_torch,
    slow_decay_torch,
    slow_share_torch,
)
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet
from triton_hybrid.kernels.placement import Places, placed_by_update
from triton_hybrid.kernels.rows import OWN
from triton_hybrid.kernels.scalars import HYPER, UPDATE_SUMS, Scalars
from triton_hybrid.kernels.together_torch import Together, dots, together
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
    again: Displacement | None = None,
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

    rates = None
    if slow_beta > 0:
        rates = averaging_rates(ledger, slow_beta, gradient.norm, coefficient)
    measured = measured and rates is not None
    sums = torch.zeros(UPDATE_SUMS, dtype=torch.float64, device=ledger.device)
    skip = None if ledger.device.type == "cpu" else ~applied
    if skip is not None or bool(applied):
        for tensors in sets:
            compared = measured and not tensors.frozen
            clip = coefficient * unscale
            assert tensors.rule is not None
            if tensors.rule.prepare_torch is not None:
                tensors.rule.prepare_torch(tensors, scalars, clip, skip)
            table = update_numbers(tensors, scalars, clip)
            part = 1.0 if reduce is None else tensors.share
            places = None
            if again is not None and placed_by_update(tensors):
                places = Places(tensors, scalars, again)
            sums += part * _update(tensors, table, skip, rates, measured, compared, places)
            here: float | Tensor = 1.0
            if not all(tensors.present):
                here = torch.tensor(tensors.present, device=ledger.device)
            tensors.steps.add_(applied.float() * here)

    if measured and reduce is not None:
        sums = reduce(sums)
    close_step_torch(
        ledger, gradient, sums, None if rates is None else rates[1], slow_beta, observed, measured
    )


class Gradient(NamedTuple):
    """What the gradients of a step have in common; each 0-dim."""

    norm: Tensor  # of all, without the loss scale
    nonfinite: Tensor
    applied: Tensor  # whether the update is made
    coefficient: Tensor  # what clips them
    unscale: Tensor  # what undoes the loss scale

    @classmethod
    def of(cls, scalars: Scalars, max_norm: float | None) -> Gradient:
        """From ``scalars.gradient`` and the ledger."""
        ledger, (square, bad) = scalars.ledger, scalars.gradient.unbind()
        unscale = ledger[INDEX["loss_scale"]].reciprocal()
        norm = square.sqrt() * unscale
        nonfinite = (bad > 0) | (ledger[INDEX["found_inf"]] > 0)
        applied = ~(nonfinite | (ledger[INDEX["hold"]] > 0))
        coefficient = torch.ones_like(norm)
        if max_norm is not None:
            coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
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
    ledger[INDEX["norm"]] = torch.where(nonfinite, ledger[INDEX["norm"]], norm)
    ledger[INDEX["nonfinite"]] = nonfinite.double()
    ledger[INDEX["skipped"]] += nonfinite
    ledger[INDEX["applied"]] += applied
    if observed:
        used = norm * coefficient
        # A norm that overflowed would spoil every running mean for good.
        seen = applied & used.isfinite()
        used = used if steady is None else used * steady
        observe_torch(ledger, norm, used, sums, slow_beta, seen, measured)
    ledger[INDEX["loss"]] = torch.nan
    ledger[INDEX["hold"]] = 0.0
    ledger[INDEX["found_inf"]] = 0.0
    move_loss_scale_torch(ledger, nonfinite)


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


def averaging_rates(ledger: Tensor, slow_beta: float, norm: Tensor, coefficient: Tensor) -> Tensor:
    """FP64 ``[2]``: rate of the slow EMA, factor on its gradient."""
    share = slow_share_torch(ledger, norm, coefficient)
    return torch.stack([1.0 - slow_decay_torch(ledger, slow_beta), share])


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
    rule, flat, compute = tensors.rule, tensors.flat, tensors.compute_dtype
    assert rule is not None
    on_host = skip is None
    numbers = table.tolist() if on_host else [r.unbind() for r in table.to(compute).unbind()]
    known: Any = None
    if rates is not None:
        known = rates.tolist() if on_host else rates.to(compute).unbind()
        slow_rate, steady = known
    written = [*rule.writes, *["slow_ema"] * (rates is not None)]
    sums: list[Any] = [0.0] * UPDATE_SUMS
    scratch = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
    after = tensors.steps + 1.0
    keys = [tuple(row) if on_host and here else None for here, row in zip(tensors.present, numbers)]
    parties, done = together(tensors, keys), dict[int, Sequence[float]]()
    for index, (here, row) in enumerate(zip(tensors.present, numbers)):
        its = Numbers(*row)
        if index in parties:
            party = parties[index]
            # Before anything is updated: displacements are made of the rows as they were.
            weight = None if places is None else places.weights(party)
            found = _update_together(party, its, after, scratch, known, measured, compared, weight)
            done.update(zip(party.indices, found))
        if index in done:  # in the order of tensors, whoever is worked on together
            if measured:
                sums = [total + term for total, term in zip(sums, done[index])]
            continue
        for part in tensors.torch_blocks(index) if here else ():
            w = (tensors if places is None else places).weight(index, part)
            g = flat["grad"][index][part].to(compute)
            if not on_host or its.clip != 1.0:
                g = g * its.clip
            rows = tensors.block_rows(index, part)
            block = Block(w, g, rows, its, after[index], scratch[:, : w.numel()])
            changed = [w, *(rows[name] for name in written)]
            before = [] if on_host else [tensor.clone() for tensor in changed]
            rule.torch.update(block)
            if rates is not None:
                s = rows["slow_ema"]
                if compared:
                    update, ahead, square = rule.torch_along.compare(block)
                    sums[0] += square * update.dot(update).double()
                    sums[1] += square * update.dot(ahead).double()
                    sums[2] += square * ahead.dot(ahead).double()
                if on_host:
                    s.mul_(1.0 - slow_rate).add_(g, alpha=slow_rate * steady)
                else:
                    s.add_(slow_rate * (steady * g - s))
                if measured:
                    sums[3] += s.dot(s).double()
            if skip is not None:
                for now, old in zip(changed, before):
                    now.copy_(torch.where(skip, old, now))
            tensors.put_weight(index, part, w)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=table.device) for x in sums])


def _update_together(
    party: Together,
    its: Numbers,
    after: Tensor,
    scratch: Tensor,
    rates: list[float] | None,
    measured: bool,
    compared: bool,
    weight: Tensor | None,
) -> list[Sequence[float]]:
    """`_update` of short tensors with the same numbers; returns the sums of each.

    ``weight``: theirs, joined, where it is not the one that is kept.
    """
    tensors, indices = party.tensors, party.indices
    rule, compute = tensors.rule, tensors.compute_dtype
    assert rule is not None
    in_place = rule.torch.takes_lists and tensors.kept == OWN and not tensors.has_master
    if weight is None and not in_place:
        weight = party.weight()
    converted = its.clip != 1.0 or tensors.dtype["grad"] != compute
    needed = converted or rates is not None or not rule.torch.takes_lists
    g = party.joined("grad").to(compute) if needed else None
    if g is not None and its.clip != 1.0:
        g = g * its.clip
    if rule.torch.takes_lists:
        weights = party.rows("weight") if weight is None else party.parts(weight)
        grads = party.parts(g) if converted and g is not None else party.rows("grad")
        lists: Any = {name: party.rows(name) for name in rule.writes}
        steps: Any = [*after[indices].unbind()]
        rule.torch.update(Block(weights, grads, lists, its, steps, scratch))  # type: ignore[arg-type]
    names = party.names if compared or not rule.torch.takes_lists else []
    rows = {name: party.joined(name) for name in names}
    block = Block(weight, g, rows, its, after[indices[0]], scratch[:, : party.total])  # type: ignore[arg-type]
    if not rule.torch.takes_lists:
        rule.torch.update(block)
        for name in rule.writes:
            party.put(name, rows[name])
    if weight is not None:
        party.put_weight(weight)
    if rates is None:
        return [[0.0] * UPDATE_SUMS] * len(indices)
    sums: list[list[float]] = [[0.0] * len(indices)] * UPDATE_SUMS
    if compared:
        update, ahead, square = rule.torch_along.compare(block)
        updates, aheads = party.parts(update), party.parts(ahead)
        for place, pair in enumerate(((updates, updates), (updates, aheads), (aheads, aheads))):
            sums[place] = [square * x for x in dots(*pair).tolist()]
    slow_rate, steady = rates
    slow = rows["slow_ema"] if compared else party.joined("slow_ema")
    slow.mul_(1.0 - slow_rate).add_(g, alpha=slow_rate * steady)  # type: ignore[arg-type]
    party.put("slow_ema", slow)
    if measured:
        slows = party.rows("slow_ema")
        sums[3] = dots(slows, slows).tolist()
    return list(zip(*sums))
