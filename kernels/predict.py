"""The predicted move: combine the basis, move the weights, measure the move.

    displacement = factor · slow_ema / (√v̂ + ε) + pull · (weight_ema - weight)    (slow EMA)
    displacement = factor · orthogonalised slow_ema                                (of Muon)
    displacement = Σ_j c[t, j] · history_j                                         (trajectory)

The slow EMA is the trend of the weights, the weight EMA their level: noise of the last steps
dies out, and the trend goes on (Holt's linear smoothing, 1957). ``pull`` is zero unless the
gradients of late say that the way back to the level lowers the loss, and fades with age.

What the move amounts to is looked at afterwards (``settle.py``). Neither reads a gradient, and
the ledger, not the host, decides whether anything moves at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.chunks import (
    DIRECTION,
    EXP_AVG,
    EXP_AVG_SQ,
    HISTORY,
    LAUNCH,
    REFERENCE_BLOCK,
    SLOW_EMA,
    SNAPSHOT,
    TAIL_SHARE,
    WEIGHT_EMA,
    TensorSet,
    load_row,
    load_weight,
    narrow,
    on_device,
    remaining,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.divergence import HORIZON_COLUMN, MEMORY_COLUMNS
from triton_hybrid.kernels.gram import reduce_partials
from triton_hybrid.kernels.hyper import (
    EPS,
    HYPER,
    HYPER_COLUMNS,
    LEVEL_SHARE,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    precise_div,
    precise_sqrt,
)
from triton_hybrid.kernels.hyper import HORIZON as HORIZON_HYPER
from triton_hybrid.kernels.ledger import (
    CONFIDENCE,
    COOLDOWN,
    HORIZON,
    INDEX,
    MOVED,
    NONFINITE,
    PULL,
    SLOW_COUNT,
    STRETCH,
)
from triton_hybrid.kernels.matrices import MatrixSet
from triton_hybrid.kernels.newton_schulz import orthogonalise, orthogonalise_reference

LEVEL_AGE = tl.constexpr(64.0)
"""Gradients after which the pull to the weight EMA fades, by the square of their number."""
MOVE_COLUMNS = 3
"""Sums of a move: slope, squared displacement, non-finite results."""


@triton.jit
def gate(ledger, threshold):
    """Whether the weights may move.

    At the start of a stretch, if the model is confident and nothing forbids it; later in
    it, if the first move was not taken back.
    """
    fresh = tl.load(ledger + STRETCH) == 0
    calm = (tl.load(ledger + COOLDOWN) == 0) & (tl.load(ledger + NONFINITE) == 0)
    sure = tl.load(ledger + CONFIDENCE) >= threshold
    return (fresh & calm & sure) | ((fresh == 0) & (tl.load(ledger + MOVED) > 0))


@triton.jit
def _predict_block(
    addresses, tensor, begin, length, coefficients, factor, pull,
    inverse_correction1, root_correction2, eps, slope, square, bad,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr,
    MUON: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr, SLOW: tl.constexpr,
    LEVEL: tl.constexpr, N: tl.constexpr, SAVE: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
    if SLOW and MUON:
        orthogonal = load_row(
            addresses, DIRECTION, tensor, begin, length, UPDATE_TYPE, STATE, BLOCK, FULL
        )
        displacement = factor * orthogonal
    elif SLOW:
        v = load_row(addresses, EXP_AVG_SQ, tensor, begin, length, STATE, STATE, BLOCK, FULL, 1.0)
        s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        denominator = precise_div(precise_sqrt(v), root_correction2) + eps
        displacement = factor * precise_div(s, denominator)
        if LEVEL:
            level = load_row(
                addresses, WEIGHT_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
            displacement += pull * (level - w)
    else:
        displacement = tl.zeros([BLOCK], STATE)
        for j in tl.static_range(N):
            basis = load_row(
                addresses, HISTORY + j, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
            displacement += tl.load(coefficients + tensor * N + j).to(STATE) * basis
        displacement = factor * displacement
    if SLOPES:
        m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    if SAVE:
        store_row(addresses, SNAPSHOT, tensor, begin, length, w, STATE, STATE, BLOCK, FULL)
    w = w + displacement
    store_weight(addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL)
    if SLOPES:
        slope += tl.sum((inverse_correction1 * m * displacement).to(tl.float32), axis=0)
    square += tl.sum((displacement * displacement).to(tl.float32), axis=0)
    # What the model will see is the rounded weight: FP16 overflows at 65504.
    seen = narrow(w, PARAM_TYPE).to(tl.float32)
    worst = tl.max(tl.where(tl.abs(seen) < float("inf"), 0.0, 1.0), axis=0)
    bad = tl.maximum(bad, worst)
    return slope, square, bad


@triton.jit
def _predict_kernel(
    addresses, lengths, aligned,
    chunk_tensor, chunk_start, n_chunks,
    group, hyper, steps, scales, coefficients, memory, ledger, partials,
    threshold, share,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr,
    MUON: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr, SLOW: tl.constexpr,
    LEVEL: tl.constexpr, N: tl.constexpr, SAVE: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE
    moving = gate(ledger, threshold)
    horizon = tl.load(ledger + HORIZON) * share
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        slope = tl.full((), 0.0, tl.float32)
        square = tl.full((), 0.0, tl.float32)
        bad = tl.full((), 0.0, tl.float32)
        if moving:
            tensor = tl.load(chunk_tensor + chunk)
            start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
            length = tl.load(lengths + tensor)
            full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
            row = hyper + tl.load(group + tensor) * HYPER_COLUMNS
            # A tensor that never had a gradient has empty moments, and does not move.
            step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
            inverse_correction1 = 1.0 / (1.0 - tl.exp(step * tl.load(row + LOG_BETA1)))
            root_correction2 = tl.sqrt(1.0 - tl.exp(step * tl.load(row + LOG_BETA2)))
            scale = tl.load(memory + MEMORY_COLUMNS * tensor + HORIZON_COLUMN).to(tl.float64)
            factor = horizon * scale
            pull = 0.0
            if LEVEL:
                young = tl.minimum(LEVEL_AGE / tl.maximum(tl.load(ledger + SLOW_COUNT), 1.0), 1.0)
                pull = tl.minimum(tl.load(row + LEVEL_SHARE) * young * young * factor, 1.0)
                pull = tl.where(tl.load(ledger + PULL) > 0, pull, 0.0).to(STATE)
            if SLOW:
                steps_ahead = tl.load(row + LR) * tl.load(row + HORIZON_HYPER)
                factor = -factor * steps_ahead
                if MUON:
                    factor = factor * tl.load(scales + tensor)
            factor = factor.to(STATE)
            inverse_correction1 = inverse_correction1.to(STATE)
            root_correction2 = root_correction2.to(STATE)
            eps = tl.load(row + EPS).to(STATE)
            if full:
                for inner in range(0, CHUNK, BLOCK):
                    slope, square, bad = _predict_block(
                        addresses, tensor, start + inner, length, coefficients, factor, pull,
                        inverse_correction1, root_correction2, eps, slope, square, bad,
                        PARAM_TYPE, STATE, UPDATE_TYPE, MUON,
                        MASTER, KEPT, SLOW, LEVEL, N, SAVE, SLOPES, BLOCK, True,
                    )  # fmt: skip
            else:
                for inner in range(0, remaining(start, length, CHUNK), TAIL):
                    slope, square, bad = _predict_block(
                        addresses, tensor, start + inner, length, coefficients, factor, pull,
                        inverse_correction1, root_correction2, eps, slope, square, bad,
                        PARAM_TYPE, STATE, UPDATE_TYPE, MUON,
                        MASTER, KEPT, SLOW, LEVEL, N, SAVE, SLOPES, TAIL, False,
                    )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 3
        tl.store(cell, slope)
        tl.store(cell + 1, square)
        tl.store(cell + 2, bad)


def predict(
    tensors: TensorSet,
    group: Tensor,
    steps: Tensor,
    hyper: Tensor,
    coefficients: Tensor | None,
    memory: Tensor,
    ledger: Tensor,
    partials: Tensor,
    sums: Tensor,
    *,
    threshold: float,
    share: float,
    save: bool,
    level: bool = True,
    with_slopes: bool = True,
    matrices: MatrixSet | None = None,
) -> None:
    """Moves the weights of one tensor set by one predicted step. Two launches.

    Args:
        tensors: With rows ``param``, ``weight``, ``exp_avg``, ``snapshot`` and
            ``exp_avg_sq``, ``slow_ema`` (slow EMA; ``weight_ema`` where it is kept) or
            ``history_*`` (trajectory).
        group: int32 ``[tensors]``, row of ``hyper``.
        steps: FP32 ``[tensors]``, applied base updates.
        hyper: FP64 ``[groups, HYPER_FIELDS]``.
        coefficients: FP32 ``[tensors, n]`` of the trajectory basis; None for the slow EMA.
        memory: FP32 ``[tensors, MEMORY_COLUMNS]``; its horizon factor scales each tensor.
        ledger: FP64 ledger; it decides whether anything moves, and is not changed.
        partials: FP32 ``[chunks, 3]``, scratch.
        sums: FP64 ``[tensors, 3]``, written: inner product of the bias-corrected exp_avg
            with the displacement, squared displacement, chunks with a non-finite result.
        threshold: Confidence below which nothing moves.
        share: Part of the whole displacement that this step makes.
        save: Whether to keep the weights in ``snapshot`` first.
        level: Whether to use ``weight_ema``, where there is one.
        with_slopes: False: exp_avg is not read, and the first sum is left as it is.
        matrices: Of a set that Muon moves: its slow EMA is orthogonalised first, into the row
            ``direction``, unless that was done. Takes the launches of `orthogonalise` more.
    """
    if matrices is not None and coefficients is None and not matrices.direction_known:
        orthogonalise(matrices, group, hyper, "direction", source="slow_ema")
        matrices.direction_known = True
    addresses, lengths, aligned = tensors.tables()
    chunks = tensors.chunks(every=True)
    with on_device(tensors.device):
        _predict_kernel[(tensors.tiling.programs,)](
            addresses, lengths, aligned,
            chunks.tensor, chunks.start, chunks.count,
            group, hyper, steps, hyper if matrices is None else matrices.scales,
            memory if coefficients is None else coefficients, memory, ledger,
            partials, float(threshold), float(share),
            PARAM_TYPE=tensors.dtype_of("param"), STATE=tensors.dtype_of("weight"),
            UPDATE_TYPE=tensors.dtype_of("direction"), MUON=matrices is not None,
            MASTER=tensors.has_master, KEPT=tensors.kept, SLOW=coefficients is None,
            LEVEL=level and coefficients is None and tensors.has("weight_ema"),
            N=0 if coefficients is None else coefficients.shape[1], SAVE=save,
            SLOPES=with_slopes,
            BLOCK=tensors.tiling.block, CHUNK=tensors.tiling.chunk, **LAUNCH,
        )  # fmt: skip
    reduce_partials(partials, chunks, sums, begin=0 if with_slopes else 1)


def gate_reference(ledger: Tensor, threshold: float) -> Tensor:
    """Whether the weights may move; 0-dim bool."""
    fresh = ledger[INDEX["stretch"]] == 0
    calm = (ledger[INDEX["cooldown"]] == 0) & (ledger[INDEX["nonfinite"]] == 0)
    sure = ledger[INDEX["confidence"]] >= threshold
    return (fresh & calm & sure) | (~fresh & (ledger[INDEX["moved"]] > 0))


def predict_reference(
    tensors: TensorSet,
    group: Tensor,
    steps: Tensor,
    hyper: Tensor,
    coefficients: Tensor | None,
    memory: Tensor,
    ledger: Tensor,
    sums: Tensor,
    *,
    threshold: float,
    share: float,
    save: bool,
    level: bool = True,
    with_slopes: bool = True,
    matrices: MatrixSet | None = None,
) -> None:
    """`predict` in plain torch."""
    moving = gate_reference(ledger, threshold)
    on_cpu = ledger.device.type == "cpu"
    written = sums if with_slopes else sums[:, 1:]
    written.zero_()
    if on_cpu and not bool(moving):
        return
    compute = tensors.compute_dtype
    rows = hyper[group.long()]
    step = steps.double().clamp(min=1.0)
    inverse_correction1 = 1.0 / (1.0 - (step * rows[:, HYPER["log_beta1"]]).exp())
    root_correction2 = (1.0 - (step * rows[:, HYPER["log_beta2"]]).exp()).sqrt()
    factor = memory[:, HORIZON_COLUMN.value].double() * ledger[INDEX["horizon"]] * share
    pulled = level and coefficients is None and tensors.has("weight_ema")
    young = (LEVEL_AGE.value / ledger[INDEX["slow_count"]].clamp(min=1.0)).clamp(max=1.0)
    pull = (rows[:, HYPER["level"]] * young * young * factor).clamp(max=1.0)
    pull = torch.where(ledger[INDEX["pull"]] > 0, pull, torch.zeros_like(pull))
    if coefficients is None:
        ahead = rows[:, HYPER["lr"]] * rows[:, HYPER["horizon"]]
        factor = -factor * ahead
    if coefficients is None and matrices is not None:
        if not matrices.direction_known:
            orthogonalise_reference(matrices, group, hyper, "slow_ema", "direction")
            matrices.direction_known = True
        factor = factor * matrices.scales
    elif coefficients is None:
        # s / (√v / root + eps) is root · s / (√v + root · eps): one operation less a block.
        factor = factor * root_correction2
    columns = [factor, inverse_correction1, root_correction2 * rows[:, HYPER["eps"]], pull]
    table = torch.stack(columns, dim=1).to(compute)
    scalars = table.tolist() if on_cpu else [list(row.unbind()) for row in table.unbind()]
    weights = None if coefficients is None else coefficients.to(compute)

    flat = tensors.flat
    scratch = torch.empty(2, REFERENCE_BLOCK, dtype=compute, device=tensors.device)
    totals = []
    for index in range(len(tensors)):
        factor_, inverse1, scaled_eps, pull_ = scalars[index]
        total = torch.zeros(MOVE_COLUMNS, dtype=torch.float64, device=tensors.device)
        for part in tensors.reference_blocks(index):
            w = tensors.weight(index, part)
            displacement = scratch[0, : w.numel()]
            if weights is None and matrices is not None:
                torch.mul(flat["direction"][index][part].to(compute), factor_, out=displacement)
            elif weights is None:
                v, s = flat["exp_avg_sq"][index][part], flat["slow_ema"][index][part]
                denominator = torch.sqrt(v, out=scratch[1, : w.numel()]).add_(scaled_eps)
                torch.div(s, denominator, out=displacement).mul_(factor_)
                if pulled and (not on_cpu or pull_ > 0):
                    average = flat["weight_ema"][index][part]
                    displacement += pull_ * torch.sub(average, w, out=scratch[1, : w.numel()])
            else:
                displacement.zero_()
                for j, weight in enumerate(weights[index].unbind()):
                    displacement += weight * flat[f"history_{j}"][index][part]
                displacement.mul_(factor_)
            if on_cpu:
                if save:
                    flat["snapshot"][index][part].copy_(w)
                w.add_(displacement)
            else:
                if save:
                    snapshot = flat["snapshot"][index][part]
                    snapshot.copy_(torch.where(moving, w, snapshot))
                displacement.copy_(torch.where(moving, displacement, 0.0 * factor_))
                w.copy_(torch.where(moving, w + displacement, w))
            tensors.put_weight(index, part, w)
            seen = flat["param"][index][part] if tensors.has_master else w
            if with_slopes:
                total[0] += flat["exp_avg"][index][part].dot(displacement) * inverse1
            total[1] += displacement.dot(displacement)
            # A finite sum has finite terms; on the CPU the second look costs only when not.
            if not on_cpu or not bool(seen.sum(dtype=compute).isfinite()):
                total[2] += ~seen.isfinite().all()
        totals.append(total)
    written.copy_(torch.stack(totals)[:, -written.shape[1] :])
