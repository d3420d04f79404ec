"""Sections 6 and 7: memory that does not grow, steps that do not wait, steps in a CUDA graph."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from suite_context import ANY, DTYPES, Context, release_memory
from suite_gpt2_shapes import PARAMETERS
from suite_problems import different_bits
from suite_records import UNKNOWN, Check, Row, SectionResult
from suite_steps import Workload
from torch import Tensor, nn

from triton_hybrid import HybridConfig, HybridOptimizer

EARLY, LATE = 10, 500
MEBIBYTE = 2**20
QUICK: dict[str, Any] = {
    "warmup_steps": 2,
    "full_steps": 1,
    "confidence_threshold": 0.0,
    "history": 3,
}
"""Every phase within ten steps."""
PREDICTORS = ("none", "slow_ema", "linear", "subspace", "auto")


@dataclass
class MemoryRow(Row):
    """Device memory of a training run, in bytes."""

    HEAD: ClassVar[tuple[str, ...]] = (
        "small model", f"MiB at {EARLY}", f"MiB at {LATE}",
        f"peak at {EARLY}", f"peak at {LATE}", "phases seen",
    )  # fmt: skip
    optimizer: str
    allocated_early: int
    allocated_late: int
    peak_early: int
    peak_late: int
    phases: dict[str, int]

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        sizes = (self.allocated_early, self.allocated_late, self.peak_early, self.peak_late)
        seen = " ".join(f"{name} {count}" for name, count in self.phases.items()) or UNKNOWN
        return (self.optimizer, *(f"{size / MEBIBYTE:.2f}" for size in sizes), seen)


@dataclass
class StateRow(Row):
    """Device memory that an optimizer's first step takes, for GPT-2 small."""

    HEAD: ClassVar[tuple[str, ...]] = ("GPT-2 small", "dtype", "state B/param", "whole B/param")
    optimizer: str
    dtype: str
    state_bytes_per_parameter: float
    whole_bytes_per_parameter: float

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        state, whole = self.state_bytes_per_parameter, self.whole_bytes_per_parameter
        return self.optimizer, self.dtype, f"{state:.2f}", f"{whole:.2f}"


Build = Callable[[Any], torch.optim.Optimizer]


def memory(context: Context, result: SectionResult) -> None:
    """Compares memory early and late in a run, and counts bytes of state."""
    warm_libraries(context.device)
    configs = {
        predictor: HybridConfig(**QUICK, predictor=predictor, inline=False)
        for predictor in ("slow_ema", "auto")
    }
    for name, build in optimizers(configs).items():
        context.check_time()
        row = watched_run(context, name, build)
        result.rows.append(row)
        for what, early, late in (
            ("allocated", row.allocated_early, row.allocated_late),
            ("peak", row.peak_early, row.peak_late),
        ):
            passed = early == late
            detail = "" if passed else f"{early} bytes at step {EARLY}, {late} at step {LATE}"
            check = Check(f"{name}: {what}", "", ANY, passed, float(late - early), 0.0, detail)
            context.note(result, check)
        if row.phases:
            missing = [phase for phase in ("predict", "correct") if not row.phases.get(phase)]
            detail = f"not reached: {missing}" if missing else ""
            context.note(result, Check(f"{name}: phases", "", ANY, not missing, detail=detail))
    for label in ("fp32", "bf16"):
        context.check_time()
        if context.has_room(result, f"state of GPT-2 small, {label}", 10 << 30):
            result.rows.extend(state_rows(context, label))


def optimizers(configs: dict[str, HybridConfig]) -> dict[str, Build]:
    """Makers of AdamW and of `HybridOptimizer` with each configuration, by name."""
    builds: dict[str, Build] = {
        f"hybrid {name}": functools.partial(HybridOptimizer, lr=1e-3, hybrid=config)
        for name, config in configs.items()
    }
    return {"AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True), **builds}


def warm_libraries(device: torch.device) -> None:
    """Lets the linear algebra libraries take their workspaces, which are no optimizer's."""
    square = torch.eye(3, dtype=torch.float64, device=device).expand(6, 3, 3).contiguous()
    torch.linalg.solve_ex(square, square[:, :, :1])
    small = torch.ones(2, 2, device=device)
    (small @ small).sum()
    torch.cuda.synchronize()


def watched_run(context: Context, name: str, build: Build) -> MemoryRow:
    """Trains a small model and reads the allocator early and late.

    The batch is always the same: low noise, so that ``auto`` follows the trajectory. It is large
    enough for the activations to make the peak, and not a temporary of one phase.
    """
    release_memory()
    device = context.device
    torch.manual_seed(context.seed)
    with device:
        model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
        inputs, targets = torch.randn(2048, 256), torch.randn(2048, 256)
    optimizer = build(model.parameters())
    hybrid = optimizer if isinstance(optimizer, HybridOptimizer) else None
    readings: dict[int, tuple[int, int]] = {}
    torch.cuda.reset_peak_memory_stats(device)
    for number in range(1, LATE + 1):
        if hybrid is None or hybrid.needs_backward:
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if hybrid is not None:
                hybrid.observe_loss(loss.detach())
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number in (EARLY, LATE):
            gc.collect()
            torch.cuda.synchronize()
            readings[number] = (
                torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device),
            )  # fmt: skip
        if number % 50 == 0:
            context.check_time()
    phases = hybrid.stats().steps_per_phase if hybrid is not None else {}
    (early, early_peak), (late, late_peak) = readings[EARLY], readings[LATE]
    return MemoryRow(name, early, late, early_peak, late_peak, dict(phases))


def state_rows(context: Context, label: str) -> Iterator[StateRow]:
    """Bytes for each parameter of GPT-2 small, after one step."""
    work = Workload(DTYPES[label], context.device, gradients=1)
    configs = {name: HybridConfig(predictor=name) for name in ("none", "slow_ema", "auto")}
    for name, build in optimizers(configs).items():
        context.check_time()
        release_memory()
        before = torch.cuda.memory_allocated(context.device)
        optimizer = build(work.params)
        optimizer.step()
        torch.cuda.synchronize()
        state = torch.cuda.memory_allocated(context.device) - before
        # Parameters and gradients have the same dtype.
        whole = state + 2 * PARAMETERS * DTYPES[label].itemsize
        yield StateRow(name, label, state / PARAMETERS, whole / PARAMETERS)
        del optimizer


# ---------------------------------------------------------------------------------- waiting


def no_waiting(context: Context, result: SectionResult) -> None:
    """Lets torch raise where a step waits for the device; then captures and replays a step."""
    for predictor in PREDICTORS:
        context.check_time()
        guarded(context, result, f"no synchronisation, {predictor}", unwatched_steps, predictor)
    for label in ("fp32", "bf16"):
        context.check_time()
        guarded(context, result, f"graph replay is the eager step, {label}", replayed, label)


def guarded(
    context: Context,
    result: SectionResult,
    name: str,
    run: Callable[[Context, str], tuple[bool, str]],
    argument: str,
) -> None:
    """Keeps one check; an exception is its failure, and the others still run."""
    try:
        passed, detail = run(context, argument)
    except Exception as error:
        # The innermost frame of the package is where the step waits.
        frames = [
            f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if "torch/" not in frame.filename
        ]
        passed = False
        detail = f"{type(error).__name__}: {str(error).splitlines()[:1]} at {' > '.join(frames)}"
    context.note(result, Check(name, "", ANY, passed, detail=detail))


def small_parameters(context: Context, dtype: torch.dtype, seed: int) -> list[nn.Parameter]:
    """A few parameters, the same for the same seed."""
    generator = torch.Generator(context.device).manual_seed(seed)
    shapes = ((300, 40), (300,), (40, 257), (1,))
    return [
        nn.Parameter(torch.randn(s, generator=generator, device=context.device).to(dtype))
        for s in shapes
    ]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, torch raises wherever the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unwatched_steps(context: Context, predictor: str) -> tuple[bool, str]:
    """Steps through every phase, with changing gradients, losses and learning rates.

    The first steps build the state and compile; after them nothing may wait.
    """
    params = small_parameters(context, torch.float32, context.seed)
    config = HybridConfig(**QUICK, predictor=predictor, inline=False)
    optimizer = HybridOptimizer(params, lr=1e-3, hybrid=config, capturable=True)
    target = [torch.randn_like(param) for param in params]

    def step(number: int) -> str:
        phase = optimizer.phase.value
        for param, goal in zip(params, target):
            param.grad = param.detach() - goal
        if optimizer.needs_backward:
            grads = [param.grad.square().sum() for param in params if param.grad is not None]
            optimizer.observe_loss(torch.stack(grads).sum())
        if number % 7 == 0:
            optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        return phase

    for number in range(24):
        step(number)
    torch.cuda.synchronize()
    seen: set[str] = set()
    with waiting_is_an_error():
        for number in range(48):
            seen.add(step(number))
    torch.cuda.synchronize()
    expected = set() if predictor == "none" else {"predict", "correct"}
    return expected <= seen, f"phases: {', '.join(sorted(seen))}"


def replayed(context: Context, label: str) -> tuple[bool, str]:
    """Captures a FULL step and replays it beside an optimizer that steps eagerly."""
    dtype = DTYPES[label]
    config = HybridConfig(warmup_steps=0, predictor="none")

    def build() -> tuple[list[nn.Parameter], HybridOptimizer]:
        params = small_parameters(context, dtype, context.seed)
        for param in params:
            param.grad = torch.zeros_like(param)
        return params, HybridOptimizer(params, lr=1e-3, hybrid=config, capturable=True)

    (eager_params, eager), (graph_params, captured) = build(), build()
    generator = torch.Generator(context.device).manual_seed(context.seed + 1)

    def gradients() -> None:
        for left, right in zip(eager_params, graph_params):
            assert left.grad is not None
            assert right.grad is not None
            drawn = torch.randn(left.shape, generator=generator, device=context.device)
            left.grad.copy_(drawn)
            right.grad.copy_(drawn)

    # Eagerly on a side stream first, as torch asks for before a capture.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
            eager.step()
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in range(5):
        if number:
            gradients()
        eager.step()
        graph.replay()
    torch.cuda.synchronize()

    def everything(params: list[nn.Parameter], optimizer: HybridOptimizer) -> list[Tensor]:
        state = [
            value
            for param in params
            for value in optimizer.state[param].values()
            if isinstance(value, Tensor)
        ]
        return [*(param.detach() for param in params), *state]

    different = different_bits(everything(eager_params, eager), everything(graph_params, captured))
    steps = float(captured.state[graph_params[0]]["step"])
    passed = different == 0 and steps == 8.0
    return passed, f"{different} elements differ, {steps:.0f} of 8 steps counted"
