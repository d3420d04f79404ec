"""Sections: state of the promised size, in steps that never wait, in host memory if asked."""

from __future__ import annotations

import gc
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.context import Context, different, parameters
from gpu.timing import ratios, spread
from gpu.training import (
    REFERENCE,
    STEPPED,
    Build,
    Training,
    Workload,
    adamw,
    hybrid,
    in_turn,
    room,
)
from lib.gpt2_shapes import PARAMETERS
from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer
from triton_hybrid.config import OFFLOADS
from triton_hybrid.graphs import GraphedSteps
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.rules import OPTIONS, RULES

EARLY, LATE = 20, 300
QUICK: dict[str, Any] = {"warmup_steps": 2, "full_steps": 1, "inline": False}
QUICK |= {"confidence_threshold": 0.0}  # every phase within ten steps
SLACK_SHARE, SLACK_BYTES = 0.02, 4 << 20  # for tables, sums and the allocator's rounding
MASTERS = {"auto": 4, "split": 2, "none": 0}
KINDS: tuple[tuple[str, str, torch.dtype, str], ...] = (
    *(("adamw", predictor, torch.float32, "auto") for predictor in PREDICTORS),
    *(("adamw", "auto", torch.bfloat16, masters) for masters in MASTERS),
    ("lion", "none", torch.float32, "auto"),
)
"""Base rule, predictor, dtype of parameters, ``master_weights``."""
LARGEST = 104  # bytes of a parameter that any of them takes, with gradients


def memory(context: Context) -> None:
    """Counts bytes of state for GPT-2 small, and compares memory early and late in a run."""
    for kind in KINDS:
        if context.has_room(f"state of GPT-2 small, {kind}", LARGEST * PARAMETERS):
            count_state(context, *kind)
    for predictor in ("slow_ema", "auto"):
        watch(context, HybridConfig(**QUICK, predictor=predictor))


def promised_bytes(base: str, predictor: str, dtype: torch.dtype, masters: str) -> int:
    """Bytes of state for a parameter, from the declared rows."""
    rule, choice = RULES[base], PREDICTORS[predictor](HybridConfig(predictor=predictor))
    rows = dict.fromkeys((*rule.rows, *choice.rows_for(rule)))
    kept = MASTERS[masters] if dtype.itemsize == 2 else 0
    return kept + sum(row.itemsize(dtype, OPTIONS) for row in rows)


def count_state(
    context: Context, base: str, predictor: str, dtype: torch.dtype, masters: str
) -> None:
    """Compares what a first step allocates with what is promised."""
    params = Workload(context, dtype).parameters()
    count = sum(param.numel() for param in params)
    before, _ = allocated(context)
    config = HybridConfig(predictor=predictor)
    optimizer = HybridOptimizer(params, base=base, hybrid=config, master_weights=masters)
    optimizer.step()
    found = allocated(context)[0] - before
    if not context.on_gpu:
        found = optimizer.stats().state_bytes_device
    promised = promised_bytes(base, predictor, dtype, masters)
    name = f"{base}, {predictor}, {str(dtype).removeprefix('torch.')}, masters {masters}"
    context.row(state=name, promised_bytes=promised, allocated=found / count)
    held = found <= promised * count * (1 + SLACK_SHARE) + SLACK_BYTES
    context.check(f"{name}: bytes a parameter", held, found / count, promised)


def allocated(context: Context) -> tuple[int, int]:
    """Bytes of device memory, now and at the peak; zeros on the CPU."""
    if not context.on_gpu:
        return 0, 0
    context.synchronise()
    gc.collect()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def training(
    context: Context,
    build: Callable[..., HybridOptimizer],
    steps: int,
    width: int,
    rows: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Iterator[tuple[int, HybridOptimizer]]:
    """Trains two layers on one batch, in windows of one or two backward passes.

    Yields the number after each step, and the optimizer.
    """
    torch.manual_seed(context.seed)
    with context.device:
        model = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
        inputs, targets = torch.randn(rows, width), torch.randn(rows, width)
    wrapped = wrap(model)
    optimizer = build(wrapped.parameters())
    for number in range(1, steps + 1):
        if optimizer.needs_backward:
            for _ in range(1 + number // 7 % 2):
                loss = nn.functional.mse_loss(wrapped(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.observe_loss(loss.detach())
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield number, optimizer


def watch(context: Context, config: HybridConfig) -> None:
    """Reads the allocator early and late in a run, whose activations make the peak."""
    name, build = f"hybrid {config.predictor}", partial(HybridOptimizer, hybrid=config)
    context.release_memory()
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    width, rows, late = (256, 2048, LATE) if context.on_gpu else (8, 8, 2 * EARLY)
    readings: dict[int, tuple[int, int]] = {}
    phases: dict[str, int] = {}
    for number, optimizer in training(context, build, late, width, rows):
        context.check_time()
        if number in (EARLY, late):
            readings[number] = allocated(context)
            phases = optimizer.stats().steps_per_phase
    first, last = readings.values()
    context.row(training=name, steps=late, bytes=last[0], peak_bytes=last[1], phases=phases)
    for what, grown in zip(("allocated", "peak"), (b - a for a, b in zip(first, last))):
        context.check(f"{name}: {what} bytes grown since step {EARLY}", grown == 0, grown, 0)
    missing = [phase for phase, count in phases.items() if not count]
    context.check(f"{name}: every phase was seen", not missing, detail=f"missing: {missing}")


SHAPES = ((300, 40), (300,), (40, 257), (1,))
REPLAYED = 48  # steps, the later half of them from graphs
COMPILING, WATCHED = 24, 48  # steps that may wait, and that may not
CAPTURED = ("slow_ema", "linear", "secant")
STILL = HybridConfig(warmup_steps=0, predictor="none")


def waiting(context: Context) -> None:
    """Lets torch raise where a step waits for the device; then takes steps from graphs."""
    for predictor in PREDICTORS:
        guarded(context, f"no synchronisation, {predictor}", partial(unwatched_steps, predictor))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for what, config, windows in (
            ("a step", STILL, None),
            ("a step of adaptive windows", STILL, AccumulationConfig(4)),
            *((f"every phase, {p}", replace(STEPPED, predictor=p), None) for p in CAPTURED),
        ):
            run = partial(replayed, dtype, config, windows)
            guarded(context, f"a graph's replay is the eager step, {name}, {what}", run)


def guarded(context: Context, name: str, run: Callable[[Context], tuple[bool, str]]) -> None:
    """Tells one check; an exception is its failure, and the others still run."""
    context.check_time()
    try:
        passed, detail = run(context)
    except Exception as error:
        # The innermost frames outside torch are where the step waits.
        frames = [
            f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if "torch/" not in frame.filename
        ]
        first = (str(error).splitlines() or [""])[0]
        passed, detail = False, f"{type(error).__name__}: {first} at {' > '.join(frames)}"
    context.check(name, passed, detail=detail)


def unwatched_steps(predictor: str, context: Context) -> tuple[bool, str]:
    """Steps through every phase with changing rates; after the first, which compile, none waits."""
    config = HybridConfig(**QUICK, predictor=predictor)
    build = partial(HybridOptimizer, lr=1e-3, hybrid=config, capturable=True)
    seen: set[str] = set()
    try:
        for number, optimizer in training(context, build, COMPILING + WATCHED, 32, 64):
            if number == COMPILING:
                context.synchronise()
                seen.clear()
                _waiting_is(context, "error")
            seen.add(optimizer.phase.value)
            if number % 5 == 0:
                optimizer.param_groups[0]["lr"] *= 0.9
    finally:
        _waiting_is(context, "default")
    context.synchronise()
    expected = set() if predictor == "none" else {"predict", "correct"}
    return expected <= seen, f"phases: {', '.join(sorted(seen))}"


def _waiting_is(context: Context, mode: str) -> None:
    if context.on_gpu:
        torch.cuda.set_sync_debug_mode(mode)


def everything(optimizer: HybridOptimizer) -> list[Tensor]:
    """Parameters and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    entries = [value for param in params for _, value in sorted(optimizer.state[param].items())]
    return [*params, *(value for value in entries if isinstance(value, Tensor))]


def graphed(context: Context, optimizer: HybridOptimizer) -> GraphedSteps | None:
    """What takes its steps from graphs, where there are some."""
    return GraphedSteps(optimizer) if context.on_gpu else None


def replayed(
    dtype: torch.dtype,
    config: HybridConfig,
    windows: AccumulationConfig | None,
    context: Context,
) -> tuple[bool, str]:
    """Takes steps from a graph for each kind, beside an optimizer that steps eagerly.

    On the CPU both do.
    """
    signal = context.normal(SHAPES, 1.0, 1, dtype)
    gradients = [torch.zeros_like(each) for each in signal]
    left, right = (parameters(context.normal(SHAPES, 1.0, 0, dtype), gradients) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-3, "hybrid": config, "accumulation": windows}
    eager, captured = (
        HybridOptimizer(params, capturable=True, **settings) for params in (left, right)
    )
    graphs, offsets, lengths = graphed(context, captured), itertools.count(2), set[int]()
    step, seen, late = captured.step if graphs is None else graphs.step, set[str](), 0
    for number in range(REPLAYED):
        for optimizer in (eager, captured):
            optimizer.zero_grad(set_to_none=False)
            optimizer.param_groups[0]["lr"] *= 0.99  # which no graph may bake in
        length = 0 if eager.needs_backward else 1
        while not length or not all([o.window_complete for o in (eager, captured)]):
            noise = context.normal(SHAPES, 0.2, next(offsets), dtype)
            torch._foreach_add_(gradients, torch._foreach_add(signal, noise))
            length += 1
        lengths.add(length)
        seen.add(eager.phase.value)
        eager.step()
        before = 0 if graphs is None else graphs.captured
        step()
        if graphs is not None and graphs.captured > before:
            late = number
    context.synchronise()
    apart = different(everything(eager), everything(captured))
    counted, taken = (float(everything(o)[-1]) for o in (captured, eager))
    predicts = {"predict", "correct"} if config.predictor != "none" else set[str]()
    count = 0 if graphs is None else graphs.captured
    detail = f"{apart} tensors differ, {counted:.0f} of {taken:.0f} steps counted, {count} graphs, "
    detail += f"the last captured in step {late} of {REPLAYED}, phases {', '.join(sorted(seen))}, "
    detail += f"windows of {sorted(lengths)}"
    held = graphs is None or (count > bool(predicts) and late < REPLAYED / 2)
    return held and apart == 0 and counted == taken and predicts | {"full"} <= seen, detail


LONG = {**QUICK, "full_steps": 2, "max_predict_steps": 7, "correction_interval": 7}
"""Stretches so long that the moments of a trajectory's predictions leave the device."""
STEPS = 40
MOST_BYTES = 0.1  # a parameter's, beyond AdamW's own, that stay on the device between two steps
SEQUENCES, TOKENS, ROUNDS = 16, 1024, 10


def offload(context: Context) -> None:
    """Checks that offloading changes no bit, and measures what it saves and costs."""
    for predictor in [name for name in PREDICTORS if name != "none"]:
        usual, _ = trained(context, predictor, OFFLOADS[0])
        for kind in OFFLOADS[1:]:
            context.check_time()
            other, beyond = trained(context, predictor, kind)
            name, apart = f"{predictor}, {kind}", different(usual, other)
            context.check(f"{name}: tensors that differ", apart == 0, apart, 0)
            words = f"{name}: B/param beyond AdamW's between steps"
            context.check(words, beyond <= MOST_BYTES, beyond, MOST_BYTES)
    cost(context)


def trained(context: Context, predictor: str, kind: str) -> tuple[list[Tensor], float]:
    """Parameters and state after some training; the most B/param beyond AdamW's between steps."""
    config = HybridConfig(**LONG, predictor=predictor, offload=kind)
    build = partial(HybridOptimizer, lr=1e-3, hybrid=config)
    width = 512 if context.on_gpu else 96  # large: copies are under way for a while
    beyond = 0.0
    for _, optimizer in training(context, build, STEPS, width, 256):
        if optimizer.needs_backward:
            count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            beyond = max(beyond, optimizer.stats().state_bytes_device / count - 8.0)
    optimizer.state_dict()
    return [tensor.detach().cpu().clone() for tensor in everything(optimizer)], beyond


def cost(context: Context) -> None:
    """Trains GPT-2 small with state in each kind of memory, each alone in the device's."""
    builds: dict[str, Build] = {REFERENCE: adamw}
    builds |= {f"hybrid, {kind}": partial(hybrid, offload=kind) for kind in OFFLOADS}
    reference: list[float] = []
    for name, build in builds.items():
        if context.has_room(f"GPT-2 small, {name}", room(1, SEQUENCES, TOKENS)):
            before, _ = allocated(context)
            model = Training(context, SEQUENCES, TOKENS, mixed=True, build=build)
            times = in_turn(context, {name: model}, ROUNDS)[name]
            between = {"B/param_between_steps": (allocated(context)[0] - before) / PARAMETERS}
            wholes, steps = [sum(each) for each in times], [each[1] for each in times]
            reference = reference or wholes
            ratio = {f"of_{REFERENCE}": ratios(wholes, reference)["median"]}
            both = {"whole_ms": spread(wholes), "step_ms": spread(steps)}
            context.row(optimizer=name, **between, **both, **ratio)
            del model
