"""Fused AdamW over many tensors: statistics of the gradient, then the update.

One kernel in two parts. The first sums up the squared gradient and looks for non-finite
values; the second updates. The second needs the result of the first for *all* tensors
(global-norm clipping; a non-finite gradient must change nothing), so between them lies
either a grid barrier (one cooperative launch) or the end of a launch (two launches).

The update moves 28 bytes a parameter, in FP32 and in 16 bit with FP32 masters; the first
part reads the gradient once more, the slow EMA adds 8 and the weight EMA 8.

The tensors of a Muon set move along their orthogonalised momentum instead
(``newton_schulz.py``), between the two parts; clipping, masters, slow EMA, measurements and
books are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.adamw_reference import SUMS, adamw_step_reference
from triton_hybrid.kernels.chunks import (
    DIRECTION,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    INTERPRETED,
    ORTHOGONAL,
    RESIDENT_LAUNCH,
    SLOW_EMA,
    TAIL_SHARE,
    WEIGHT_EMA,
    TensorSet,
    load_row,
    load_weight,
    on_device,
    remaining,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.hyper import (
    BETA1,
    BETA2,
    EPS,
    HYPER,
    HYPER_COLUMNS,
    HYPER_FIELDS,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    SIGN,
    WEIGHT_DECAY,
    clip_coefficient,
    gradient_verdict,
    precise_div,
    precise_sqrt,
)
from triton_hybrid.kernels.ledger import APPLIED, FOUND_INF, HOLD, LOSS, NONFINITE, NORM, SKIPPED
from triton_hybrid.kernels.loss_scale import move_loss_scale
from triton_hybrid.kernels.matrices import MatrixSet
from triton_hybrid.kernels.newton_schulz import orthogonalise
from triton_hybrid.kernels.observe import level_decay, observe, slow_clip, slow_decay

__all__ = [
    "HYPER",
    "HYPER_FIELDS",
    "PARTIAL_ROWS",
    "Workspace",
    "adamw_step",
    "adamw_step_reference",
    "cooperative_launches",
]

PARTIAL_ROWS = SUMS + 2
"""First-stage sums of each program: squared gradient, non-finite gradients, and those of an
update."""

STATISTICS, UPDATE = 1, 2


class Workspace:
    """Scratch memory of the kernel for the tensor sets of one device.

    Args:
        sets: The tensor sets whose gradients are clipped and checked together.
    """

    def __init__(self, sets: Sequence[TensorSet]) -> None:
        device = sets[0].device
        self.offsets: list[int] = []
        total = 0
        for tensors in sets:
            self.offsets.append(total)
            total += tensors.tiling.programs
        self.columns = triton.next_power_of_2(total)
        self.partials = torch.zeros(PARTIAL_ROWS, self.columns, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(2, dtype=torch.int32, device=device)


@triton.jit
def _gradient_statistics(
    addresses, tensor, start, count, length,
    GRAD_TYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Squared norm of a chunk's gradient, and 1 where it holds a non-finite value."""
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for inner in range(0, count, BLOCK):
        g = load_row(
            addresses, GRAD, tensor, start + inner, length, GRAD_TYPE, COMPUTE, BLOCK, FULL
        )
        square += (g * g).to(tl.float32)
        bad = tl.maximum(bad, tl.where(tl.abs(g) < float("inf"), 0.0, 1.0))
    return tl.sum(square, axis=0), tl.max(bad, axis=0)


@triton.jit
def _update_block(
    addresses, tensor, begin, length,
    clip, decay, beta1, beta2, root_correction2, eps, step_size, slow_rate, steady, level_rate,
    uu, us, ss, ee, pull,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, COMPUTE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MUON: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, LEVEL: tl.constexpr, COMPARE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, COMPUTE, KEPT, BLOCK, FULL)
    if SLOW or not MUON:
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, COMPUTE, BLOCK, FULL)
        g = g * clip
    if LEVEL:
        # Read here and, from cache, once more at the end: kept in between, it would spill
        # registers (8 bytes on sm_120, 51 registers of 16-bit weights on gfx942).
        level = load_row(
            addresses, WEIGHT_EMA, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL
        )
        pull += tl.sum((g * (w - level)).to(tl.float32), axis=0)
    if MUON:
        if SLOW:
            s = load_row(addresses, SLOW_EMA, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL)
        orthogonal = load_row(
            addresses, ORTHOGONAL, tensor, begin, length, UPDATE_TYPE, COMPUTE, BLOCK, FULL
        )
        update = step_size * orthogonal
    else:
        m = load_row(addresses, EXP_AVG, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL)
        # Ones beyond the end keep the quotients finite there, also where eps is 0.
        v = load_row(
            addresses, EXP_AVG_SQ, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL, 1.0
        )
        if SLOW:
            s = load_row(addresses, SLOW_EMA, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL)
        m = m + (1.0 - beta1) * (g - m)
        v = v * beta2 + (1.0 - beta2) * (g * g)
        denominator = precise_div(precise_sqrt(v), root_correction2) + eps
        update = step_size * precise_div(m, denominator)
        store_row(addresses, EXP_AVG, tensor, begin, length, m, COMPUTE, COMPUTE, BLOCK, FULL)
        store_row(addresses, EXP_AVG_SQ, tensor, begin, length, v, COMPUTE, COMPUTE, BLOCK, FULL)
    w = w * decay - update
    store_weight(
        addresses, tensor, begin, length, w, PARAM_TYPE, COMPUTE, MASTER, KEPT, BLOCK, FULL
    )
    if SLOW:
        if COMPARE:
            if MUON:
                ahead = load_row(
                    addresses, DIRECTION, tensor, begin, length, UPDATE_TYPE, COMPUTE, BLOCK, FULL
                )
                direction = step_size * ahead
            else:
                direction = step_size * precise_div(s, denominator)
            uu += tl.sum((update * update).to(tl.float32), axis=0)
            us += tl.sum((update * direction).to(tl.float32), axis=0)
            ss += tl.sum((direction * direction).to(tl.float32), axis=0)
        s = s + slow_rate * (steady * g - s)
        ee += tl.sum((s * s).to(tl.float32), axis=0)
        store_row(addresses, SLOW_EMA, tensor, begin, length, s, COMPUTE, COMPUTE, BLOCK, FULL)
    if LEVEL:
        level = load_row(
            addresses, WEIGHT_EMA, tensor, begin, length, COMPUTE, COMPUTE, BLOCK, FULL
        )
        level = level + level_rate * (w - level)
        store_row(
            addresses, WEIGHT_EMA, tensor, begin, length, level, COMPUTE, COMPUTE, BLOCK, FULL
        )
    return uu, us, ss, ee, pull


@triton.jit
def _adamw_kernel(
    addresses, lengths, aligned, n_tensors,
    chunk_tensor, chunk_start, n_chunks, present,
    group, hyper, steps, scales,
    partials, first_column, arrivals, ledger,
    max_norm, slow_beta,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, COMPUTE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MUON: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, LEVEL: tl.constexpr, COMPARE: tl.constexpr,
    MEASURE: tl.constexpr, CLIP: tl.constexpr,
    STATISTICS_PART: tl.constexpr, UPDATE_PART: tl.constexpr, LAST: tl.constexpr,
    OBSERVE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = first_column + program
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE

    if STATISTICS_PART:
        square = tl.full((), 0.0, tl.float32)
        bad = tl.full((), 0.0, tl.float32)
        for chunk in range(program, n_chunks, programs):
            tensor = tl.load(chunk_tensor + chunk)
            start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
            length = tl.load(lengths + tensor)
            full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
            if full:
                chunk_square, chunk_bad = _gradient_statistics(
                    addresses, tensor, start, CHUNK, length, GRAD_TYPE, COMPUTE, BLOCK, True
                )
            else:
                chunk_square, chunk_bad = _gradient_statistics(
                    addresses, tensor, start, remaining(start, length, CHUNK), length,
                    GRAD_TYPE, COMPUTE, TAIL, False,
                )  # fmt: skip
            square += chunk_square
            bad = tl.maximum(bad, chunk_bad)
        tl.store(partials + column, square)
        tl.store(partials + COLUMNS + column, bad)

    if STATISTICS_PART and UPDATE_PART:
        # A grid barrier: all programs are resident together (cooperative launch), each
        # adds one when its sums are written, and waits for the others.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
        while arrived < programs:
            arrived = tl.atomic_add(arrivals, 0, sem="acquire")
        tl.debug_barrier()

    if UPDATE_PART:
        columns = tl.arange(0, COLUMNS)
        norm, nonfinite, unscale = gradient_verdict(partials, ledger, COLUMNS)
        held = tl.load(ledger + HOLD) > 0
        coefficient = clip_coefficient(norm, max_norm, CLIP)
        slow_rate = 0.0
        steady = 1.0
        level_rate = 0.0
        if SLOW:
            slow_rate = (1.0 - slow_decay(ledger, slow_beta)).to(COMPUTE)
            # How much less than the clipped gradient the slow EMA takes; 1 but for outliers.
            steady = slow_clip(ledger, norm, coefficient) / tl.maximum(coefficient, 1e-300)
            steady = steady.to(COMPUTE)
        if LEVEL:
            level_rate = (1.0 - level_decay(ledger)).to(COMPUTE)

        uu = tl.full((), 0.0, tl.float32)
        us = tl.full((), 0.0, tl.float32)
        ss = tl.full((), 0.0, tl.float32)
        ee = tl.full((), 0.0, tl.float32)
        pull = tl.full((), 0.0, tl.float32)
        n_updated = tl.where(nonfinite | held, 0, n_chunks)
        for chunk in range(program, n_updated, programs):
            tensor = tl.load(chunk_tensor + chunk)
            start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
            length = tl.load(lengths + tensor)
            full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
            row = hyper + tl.load(group + tensor) * HYPER_COLUMNS
            lr = tl.load(row + LR)
            step = tl.load(steps + tensor).to(tl.float64) + 1.0
            correction1 = 1.0 - tl.exp(step * tl.load(row + LOG_BETA1))
            correction2 = 1.0 - tl.exp(step * tl.load(row + LOG_BETA2))
            step_size = (lr / correction1).to(COMPUTE)
            if MUON:
                step_size = (lr * tl.load(scales + tensor)).to(COMPUTE)
            root_correction2 = tl.sqrt(correction2).to(COMPUTE)
            decay = (1.0 - lr * tl.load(row + WEIGHT_DECAY)).to(COMPUTE)
            clip = (coefficient * unscale * tl.load(row + SIGN)).to(COMPUTE)
            beta1 = tl.load(row + BETA1).to(COMPUTE)
            beta2 = tl.load(row + BETA2).to(COMPUTE)
            eps = tl.load(row + EPS).to(COMPUTE)
            if full:
                for inner in range(0, CHUNK, BLOCK):
                    uu, us, ss, ee, pull = _update_block(
                        addresses, tensor, start + inner, length,
                        clip, decay, beta1, beta2, root_correction2, eps, step_size, slow_rate,
                        steady, level_rate, uu, us, ss, ee, pull,
                        PARAM_TYPE, GRAD_TYPE, COMPUTE, UPDATE_TYPE, MUON,
                        MASTER, KEPT, SLOW, LEVEL, COMPARE, BLOCK, True,
                    )  # fmt: skip
            else:
                for inner in range(0, remaining(start, length, CHUNK), TAIL):
                    uu, us, ss, ee, pull = _update_block(
                        addresses, tensor, start + inner, length,
                        clip, decay, beta1, beta2, root_correction2, eps, step_size, slow_rate,
                        steady, level_rate, uu, us, ss, ee, pull,
                        PARAM_TYPE, GRAD_TYPE, COMPUTE, UPDATE_TYPE, MUON,
                        MASTER, KEPT, SLOW, LEVEL, COMPARE, TAIL, False,
                    )  # fmt: skip
        if SLOW:
            tl.store(partials + 2 * COLUMNS + column, uu)
            tl.store(partials + 3 * COLUMNS + column, us)
            tl.store(partials + 4 * COLUMNS + column, ss)
            tl.store(partials + 5 * COLUMNS + column, ee)
            tl.store(partials + 6 * COLUMNS + column, pull)

        # The last program to finish keeps the books: nobody else reads them any more.
        tl.debug_barrier()
        finished = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") + 1
        if finished == programs:
            tl.store(arrivals, 0)
            tl.store(arrivals + 1, 0)
            # Looked up again: kept through the update, they would cost registers there.
            final_norm, any_bad, _ = gradient_verdict(partials, ledger, COLUMNS)
            applied = (any_bad == 0) & (tl.load(ledger + HOLD) <= 0)
            # One thread writes the ledger; first every thread must have read what it
            # decides by.
            tl.debug_barrier()
            for begin in range(0, n_tensors, TENSORS):
                t = begin + tl.arange(0, TENSORS)
                here = t < n_tensors
                advance = tl.where(applied, tl.load(present + t, mask=here, other=0), 0)
                old = tl.load(steps + t, mask=here, other=0.0)
                tl.store(steps + t, old + advance.to(tl.float32), mask=here)
            if LAST:
                if any_bad == 0:
                    tl.store(ledger + NORM, final_norm)
                tl.store(ledger + NONFINITE, any_bad.to(tl.float64))
                tl.store(ledger + SKIPPED, tl.load(ledger + SKIPPED) + any_bad.to(tl.float64))
                tl.store(ledger + APPLIED, tl.load(ledger + APPLIED) + applied.to(tl.float64))
                final_clip = clip_coefficient(final_norm, max_norm, CLIP)
                used = final_norm * final_clip
                final_steady = 1.0
                if SLOW:
                    final_clip = tl.maximum(final_clip, 1e-300)
                    final_steady = slow_clip(ledger, final_norm, final_clip) / final_clip
                if OBSERVE:  # noqa: SIM102 - known when compiled, unlike the next
                    # A norm that overflowed would spoil every running mean for good.
                    if applied & (used < float("inf")):
                        sums_uu = tl.load(partials + 2 * COLUMNS + columns, cache_modifier=".cg")
                        sums_us = tl.load(partials + 3 * COLUMNS + columns, cache_modifier=".cg")
                        sums_ss = tl.load(partials + 4 * COLUMNS + columns, cache_modifier=".cg")
                        sums_ee = tl.load(partials + 5 * COLUMNS + columns, cache_modifier=".cg")
                        pulls = tl.load(partials + 6 * COLUMNS + columns, cache_modifier=".cg")
                        observe(
                            ledger,
                            final_norm,
                            used * final_steady,
                            tl.sum(sums_uu.to(tl.float64), axis=0),
                            tl.sum(sums_us.to(tl.float64), axis=0),
                            tl.sum(sums_ss.to(tl.float64), axis=0),
                            tl.sum(sums_ee.to(tl.float64), axis=0),
                            tl.sum(pulls.to(tl.float64), axis=0) * final_steady,
                            slow_beta,
                            SLOW,
                            MEASURE,
                        )
                tl.store(ledger + LOSS, float("nan"))
                tl.store(ledger + HOLD, 0.0)
                tl.store(ledger + FOUND_INF, 0.0)
                move_loss_scale(ledger, any_bad)


@functools.cache
def cooperative_launches(device: torch.device) -> bool:
    """Whether statistics and update can share one launch on this device.

    True for the interpreter (one program, nobody to wait for) and for a Triton that can
    launch cooperatively (not 3.2).
    """
    if device.type != "cuda":
        return True
    from triton.compiler import make_backend
    from triton.runtime import driver

    options = make_backend(driver.active.get_current_target()).parse_options(dict(RESIDENT_LAUNCH))
    return hasattr(options, "launch_cooperative_grid")


def adamw_step(
    sets: Sequence[TensorSet],
    groups: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    ledger: Tensor,
    workspace: Workspace,
    *,
    max_norm: float | None,
    slow_beta: float,
    observed: bool,
    measured: bool = True,
    level: bool = True,
    cooperative: bool | None = None,
    matrices: Sequence[MatrixSet | None] = (),
) -> None:
    """One base step over tensor sets of different dtypes on one device.

    One launch for a single set (statistics, grid barrier, update); two for each set
    otherwise, or where Triton cannot launch cooperatively, and those of `orthogonalise`
    between them for a set of Muon.

    Args:
        sets: Tensor sets with rows ``param``, ``grad``, ``weight``, ``exp_avg``,
            ``exp_avg_sq`` and, when ``slow_beta`` is positive, ``slow_ema``.
        groups: For each set, int32 ``[tensors]``: the row of ``hyper`` that applies.
        steps: For each set, FP32 ``[tensors]``: applied steps, advanced in place.
        hyper: FP64 ``[groups, len(HYPER_FIELDS)]``.
        ledger: FP64 ledger. ``hold`` keeps the update back.
        workspace: Scratch memory made for these sets.
        max_norm: Global-norm clipping threshold, or None.
        slow_beta: Largest decay of the slow gradient EMA; 0 for none.
        observed: Whether the running statistics of the ledger are kept.
        measured: Whether update and slow direction are compared in this step.
        level: Whether a row ``weight_ema``, where there is one, is kept up to date.
        cooperative: Forces or forbids the single launch; None takes what the device can.
        matrices: For each set, its matrices where Muon moves it, with rows ``update`` and, when
            ``slow_beta`` is positive, ``direction`` instead of ``exp_avg_sq``; None for AdamW.
            Empty for AdamW everywhere. Without a row ``direction`` its updates are not compared.
    """
    muon = list(matrices) or [None] * len(sets)
    compares = [measured and slow_beta > 0 and (here is None or here.steered) for here in muon]
    alone = not INTERPRETED or sets[0].tiling.programs == 1
    if cooperative is None:
        cooperative = alone and cooperative_launches(sets[0].device)
    elif cooperative and not alone:
        raise ValueError(
            "cooperative=True: allowed in the interpreter only with a tiling of programs=1, "
            "because there programs run one after another and cannot wait for each other"
        )
    single = cooperative and len(sets) == 1 and muon[0] is None
    parts = [STATISTICS | UPDATE] if single else [STATISTICS, UPDATE]
    extra = {"launch_cooperative_grid": True} if single and not INTERPRETED else {}
    for part in parts:
        for index, tensors in enumerate(sets):
            here = muon[index]
            if here is not None and part == UPDATE:
                table = (here, groups[index], hyper)
                if compares[index]:
                    orthogonalise(*table, "direction", source="slow_ema")
                orthogonalise(
                    *table,
                    "update",
                    partials=workspace.partials,
                    ledger=ledger,
                    max_norm=max_norm,
                )
                here.direction_known = False
            addresses, lengths, aligned = tensors.tables()
            chunks = tensors.chunks()
            with on_device(tensors.device):
                _adamw_kernel[(tensors.tiling.programs,)](
                    addresses, lengths, aligned, len(tensors),
                    chunks.tensor, chunks.start, chunks.count, chunks.present,
                    groups[index], hyper, steps[index],
                    hyper if here is None else here.scales,
                    workspace.partials, workspace.offsets[index], workspace.arrivals, ledger,
                    max_norm or 0.0, float(slow_beta),
                    PARAM_TYPE=tensors.dtype_of("param"), GRAD_TYPE=tensors.dtype_of("grad"),
                    COMPUTE=tensors.dtype_of("weight"), UPDATE_TYPE=tensors.dtype_of("update"),
                    MUON=here is not None,
                    MASTER=tensors.has_master, KEPT=tensors.kept, SLOW=slow_beta > 0,
                    LEVEL=level and slow_beta > 0 and tensors.has("weight_ema"),
                    COMPARE=compares[index], MEASURE=measured and slow_beta > 0,
                    CLIP=max_norm is not None,
                    STATISTICS_PART=bool(part & STATISTICS), UPDATE_PART=bool(part & UPDATE),
                    LAST=index == len(sets) - 1, OBSERVE=observed,
                    BLOCK=tensors.tiling.block, CHUNK=tensors.tiling.chunk,
                    COLUMNS=workspace.columns, TENSORS=128,
                    **RESIDENT_LAUNCH, **extra,
                )  # fmt: skip
