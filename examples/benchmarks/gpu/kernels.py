"""Sections: the grid barrier under stress, and how many bytes a second each kernel moves."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.audit.cases import Case, cases
from triton_hybrid.kernels.backend import TRITON
from triton_hybrid.kernels.launch import MAX_PROGRAMS, Tiling
from triton_hybrid.kernels.ledger import FRACTION_COLUMN, PART_COLUMN, START, write_ledger
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.secant import products_size
from triton_hybrid.kernels.step import cooperative_launches
from triton_hybrid.kernels.trial import new_trial

from gpu.context import Context, different, parameters
from gpu.timing import Clock, Run, ratios, spread
from lib.gpt2_shapes import gpt2_small_shapes
from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.engine import Engine
from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.orthogonal import TURNED
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules import RULES

STEPS = 200
LENGTHS = (1, 8193, 40_003, 100_003)  # hardly any work between two barriers
BARE: dict[str, Any] = {"max_norm": None, "slow_beta": 0.0, "observed": False}
FULL: dict[str, Any] = {"max_norm": 1.0, "slow_beta": 0.9, "observed": True}
VARIANTS = (("bare, fp32", torch.float32, BARE), ("clip, slow EMA, bf16", torch.bfloat16, FULL))
"""The leanest kernel and the one with the most registers."""


def barrier(context: Context) -> None:
    """Takes many steps of one launch in a row, alone and beside other work."""
    if not cooperative_launches(context.device):
        context.skip("grid barrier", "this Triton cannot launch cooperatively")
        return
    steps, lengths = (STEPS, LENGTHS) if context.on_gpu else (2, LENGTHS[:2])
    for name, dtype, options in VARIANTS:
        one, two = (engine_of(context, lengths, dtype) for _ in range(2))
        for crowded in (False, True):
            context.check_time()
            elapsed = consecutive(context, one, options, steps, crowded)
            context.row(step=name, beside_products=crowded, steps=steps, ms_a_step=elapsed)
        for _ in range(2 * (1 + steps)):
            TRITON.step([two.batches[0].tensors], two.scalars, cooperative=False, **options)
        apart = different(everything(one), everything(two))
        context.check(f"{name}: tensors unlike those of two launches a step", apart == 0, apart, 0)
        left = one.scalars.arrivals.tolist()
        context.check(f"{name}: counters are left at zero", left == [0, 0], detail=str(left))
    too_many_programs(context)


def engine_of(
    context: Context,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    predictor: str = "slow_ema",
    **options: Any,
) -> Engine:
    """What an optimizer has bound in a first step, with gradients in place."""
    params = parameters(*(context.normal(lengths, 1.0, offset, dtype) for offset in range(2)))
    config = HybridConfig(predictor=predictor, warmup_steps=9, inline=False)
    optimizer = HybridOptimizer(params, lr=1e-5, backend="triton", hybrid=config, **options)
    optimizer.step()
    engine = optimizer._binding.engine
    assert engine is not None
    engine.take_gradients()
    return engine


def consecutive(
    context: Context, engine: Engine, options: dict[str, Any], steps: int, crowded: bool
) -> float:
    """Milliseconds of a step of many; crowded: other kernels take processors away meanwhile."""
    side = torch.cuda.Stream() if context.on_gpu else None  # type: ignore[no-untyped-call]
    (matrix,) = context.normal([(2048, 2048) if context.on_gpu else (8, 8)], 1.0)
    step = partial(TRITON.step, [engine.batches[0].tensors], engine.scalars, cooperative=True)
    step(**options)  # compiles
    context.synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        if crowded:
            with torch.cuda.stream(side):
                torch.mm(matrix, matrix)
        step(**options)
    context.synchronise()
    return 1e3 * (time.perf_counter() - started) / steps


def everything(engine: Engine) -> list[Tensor]:
    """Ledger, weights and state."""
    rows = engine.batches[0].tensors.flat.values()
    return [engine.scalars.ledger, *(tensor for row in rows for tensor in row)]


def too_many_programs(context: Context) -> None:
    """More programs than fit at a time must be refused, or all have room: never wait in vain."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    rows = {name: [torch.ones(1 << 20, device=context.device)] for name in names}
    tensors = TensorSet(rows, Tiling(1024, 1024, MAX_PROGRAMS), rule=RULES["adamw"].kernels)
    try:
        TRITON.step([tensors], Scalars([tensors]), cooperative=True, **BARE)
        context.synchronise()
        outcome = "all had room"
    except Exception as error:  # what it is depends on the driver
        outcome = f"refused: {(str(error).splitlines() or [''])[0]}"
    context.check(f"{MAX_PROGRAMS} programs at a time do not hang", True, detail=outcome)


# Neither the number of tensors nor that of chunks is a multiple of 16, in all three alike:
# Triton compiles other code for such numbers, and each size would measure another kernel.
SIZES: dict[str, tuple[int, ...]] = {
    "124M": tuple(torch.Size(shape).numel() for shape in gpt2_small_shapes()),
    "10M": (833_333,) * 12,
    "1B": (33_333_333,) * 30,
}
CHUNK = (1 << 16,)  # one full chunk of the interpreter
ROUNDS = {"124M": 12, "10M": 20, "1B": 6}
Kind = tuple[str, str, torch.dtype, str]
"""Rule, precision as the audit calls it, dtype of parameters, ``master_weights``; ``secant``: the
passes of that predictor beside AdamW."""
KINDS: tuple[Kind, ...] = (
    ("adamw", "fp32", torch.float32, "auto"), ("adamw", "bf16", torch.bfloat16, "auto"),
    ("adamw", "bf16 split", torch.bfloat16, "split"), ("lion", "fp32", torch.float32, "auto"),
    ("secant", "fp32", torch.float32, "auto"),
)  # fmt: skip
BYTES = 60  # of a parameter with gradient and every row of state, also torch's, and a little more
HISTORY = HybridConfig().history
PAIRS = 8 * HISTORY  # bytes of a parameter beside them, of the pairs of `secant`
TORCH = "torch AdamW fused, fp32"
PATIENCE = 60.0  # seconds, with what compiles in other processes
COPY, COPIED = "copy", 14  # bytes of a parameter that AdamW reads, and writes
DECIDED = {"confidence": 0.9, "update_square": 1.0, "decision": 1.0}
"""Ledger entries: with a closed gate or without a decision a kernel would do nothing, very fast."""


class Buffers:
    """Parameters with all their rows, as the optimizer binds them; their launchers in `runs`."""

    def __init__(self, context: Context, lengths: tuple[int, ...], kind: Kind) -> None:
        base, name, dtype, masters = kind
        pairs = base == "secant"
        chosen = {"predictor": base} if pairs else {"base": base}
        engine = engine_of(context, lengths, dtype, master_weights=masters, **chosen)
        tensors, self.scalars = sets = engine.batches[0].tensors, engine.scalars
        self._ledger = write_ledger({**START, **DECIDED}, context.device)
        self.runs: dict[str, Run] = secant_runs(sets) if pairs else {}
        if pairs:
            return
        for row in ("snapshot", "displacement", "direction"):  # of `linear`, and of matrices
            wide = [torch.zeros_like(p, dtype=torch.float32) for p in engine.batches[0].params]
            tensors.set_row(row, wide)
        words = f"{base} {name}, one launch, clip"
        step = partial(TRITON.step, [tensors], self.scalars)
        self.runs |= {
            f"{base} {name}, one launch": partial(step, **BARE),
            words: partial(step, **{**BARE, "max_norm": 1.0}),
            f"{words}, slow EMA": partial(step, **FULL),
        }
        if base == "adamw":
            self.runs |= move_runs(name, sets)
        if kind == KINDS[0]:
            params = parameters(*(context.normal(lengths, 1.0, offset) for offset in range(2)))
            self.runs[TORCH] = torch.optim.AdamW(params, fused=True).step

    def ready(self) -> None:
        """Everything that a decision rests on as before the first launch."""
        self.scalars.ledger.copy_(self._ledger)
        self.scalars.sums.fill_(1.0)
        self.scalars.prediction[:, FRACTION_COLUMN.value] = 0.625
        self.scalars.prediction[:, PART_COLUMN.value] = 1.0


def move_runs(name: str, sets: tuple[TensorSet, Scalars]) -> dict[str, Run]:
    """What moves weights ahead, judges the move, and looks at what others wrote."""
    tensors, scalars = sets
    last, along = Linear.displacement, {"slow EMA": SlowEMA.displacement, "matrices": TURNED}
    numbers = torch.full((len(tensors),), 0.01, device=tensors.device)
    products = torch.zeros(len(tensors), 2, dtype=torch.float64, device=tensors.device)
    move: dict[str, Any] = {"threshold": 0.0, "share": 1.0}
    back: dict[str, Any] = {"threshold": 0.0, "limit": 0.0, "cooldown": 1.0, "last": True}
    linear = partial(TRITON.predict, *sets, last, numbers, **move)
    found: dict[str, Run] = {}
    for kind, again in along.items():
        predict, its = partial(TRITON.predict, *sets, again, **move), f"{name}, {kind}"
        found |= {
            f"predict {its}": partial(predict, first=True),
            f"predict {its} again": partial(predict, first=False),
            f"check {its}": partial(TRITON.check_move, *sets, **back, again=again),
            f"slopes {its}": partial(TRITON.slopes, *sets, again),
            f"correct {its}": partial(TRITON.correct, *sets, restart=False, again=again),
        }
    return found | {
        f"predict {name}, linear": partial(linear, first=True),
        f"predict {name}, linear again": partial(linear, first=False, with_slopes=False),
        f"check {name} (when it rolls back)": partial(TRITON.check_move, *sets, **back),
        f"slopes {name}": partial(TRITON.slopes, *sets),
        f"correct {name}, restart": partial(TRITON.correct, *sets, restart=True),
        f"gram {name}": partial(TRITON.gram, tensors, scalars.ledger, products),
        f"base slope {name}": partial(TRITON.base_slope, *sets, scalars.hyperparameters),
        f"fingerprint {name}": partial(TRITON.fingerprint, tensors, scalars.prediction[:, 4:]),
    }


def secant_runs(sets: tuple[TensorSet, Scalars]) -> dict[str, Run]:
    """The passes of a quasi-Newton move: everything is ordered, and every pair takes part."""
    wide: dict[str, Any] = {"dtype": torch.float64, "device": sets[0].device}
    orders = torch.tensor([1.0, 1.0, 0.5, 0.0], **wide)
    solution = torch.full((3 + 2 * HISTORY,), 1e-3, **wide)
    products = torch.zeros(products_size(HISTORY), **wide)
    trial = new_trial(sets[0].device, {"pairs": HISTORY})
    return {
        "secant settle fp32": partial(TRITON.settle, *sets, orders, HISTORY),
        "secant products fp32": partial(TRITON.products, *sets, trial, products, HISTORY),
        "secant move fp32": partial(TRITON.move, *sets, trial, solution, HISTORY),
    }


def counted_bytes(case: Case) -> int:
    """Bytes of a parameter, each input and each output once."""
    return case.on_paper or sum((*case.reads, *case.writes, *case.inner * case.times))


def needed(kind: Kind) -> int:
    """Bytes of a parameter."""
    return BYTES + PAIRS * (kind[0] == "secant")


def touch(number: int, device: str, seed: int, cooperative: bool) -> None:
    """Launches each kernel of a kind once, for its place in Triton's cache."""
    if not cooperative:
        importlib.import_module("gpu.fallback")
    context = Context(torch.device(device), lambda *_: None, seed)
    buffers = Buffers(context, SIZES["10M"] if context.on_gpu else CHUNK, KINDS[number])
    buffers.ready()
    for run in buffers.runs.values():
        run()
    context.synchronise()


def compiling(context: Context) -> list[Any]:
    """Processes that compile the kernels of all kinds but the first, which is measured meanwhile.

    A kernel takes a second, and there are 50: one after another they would take all the time.
    """
    spawn = multiprocessing.get_context("spawn")
    given = str(context.device), context.seed, context.cooperative
    numbers = range(1, len(KINDS)) if context.on_gpu else ()
    made = [spawn.Process(target=touch, args=(n, *given), daemon=True) for n in numbers]
    for process in made:
        process.start()
    return made


def bandwidth(context: Context) -> None:
    """Measures every kernel at every size that fits."""
    known = {case.name: case for case in cases()}
    known[TORCH] = replace(known["adamw fp32, one launch"], name=TORCH, first_pass=())
    clock, others = Clock(context), compiling(context)
    for size, lengths in (SIZES if context.on_gpu else {"chunk": CHUNK}).items():
        for kind in KINDS:
            count = sum(lengths)
            if not context.has_room(f"{size}, {kind[:2]}", needed(kind) * count):
                continue
            buffers = Buffers(context, lengths, kind)
            free = torch.cuda.mem_get_info()[0] if context.on_gpu else 1 << 40
            length = min(COPIED * count, free // 3)
            source = torch.zeros(length, dtype=torch.uint8, device=context.device)
            runs = {name: run for name, run in buffers.runs.items() if name in known}
            runs[COPY] = partial(torch.empty_like(source).copy_, source)
            times, _ = clock.in_turn(runs, ROUNDS.get(size, 1), buffers.ready)
            copied = [2 * len(source) / ms / 1e6 for ms in times.pop(COPY)]
            for name, found in times.items():
                tell(context, known[name], size, count, found, copied)
            del buffers, runs, source
            while others:
                others.pop().join(min(max(context.left, 0.0), PATIENCE))


def tell(
    context: Context, case: Case, size: str, count: int, times: list[float], copied: list[float]
) -> None:
    """Summarises the rounds of a kernel; `copied` are the copy's GB/s."""
    counted = counted_bytes(case)
    again = (case.bytes_per_element or counted) - counted
    speeds = [counted * count / ms / 1e6 for ms in times]
    share = ratios(speeds, copied)["median"]
    numbers = {"GB/s": spread(speeds)["median"], "of_copy": share}
    numbers["moved,_of_copy"] = share * (counted + again) / counted
    copy = {"copy_GB/s": spread(copied)["median"]}
    bytes_ = {"B/param": counted, "read_again": again}
    context.row(kernel=case.name, size=size, **bytes_, ms=spread(times), **numbers, **copy)
