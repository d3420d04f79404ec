"""Section 4: a whole `step()` in every phase, with GPT-2 small's parameters, beside AdamW's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from suite_context import DTYPES, Context, release_memory
from suite_gpt2_shapes import gpt2_small_shapes
from suite_problems import Launches
from suite_records import UNKNOWN, Row, SectionResult, Skip, Timing
from suite_timing import new_event, occupy
from torch import Tensor, nn

from triton_hybrid import HybridConfig, HybridOptimizer

Step = Callable[[], object]
PHASE_KERNELS = {
    "warmup": ("adamw+slow",),
    "full": ("adamw+slow",),
    "predict": ("predict slow", "settle"),
    "correct": ("slopes", "judge", "correct", "adamw+slow"),
}
"""What a phase launches when the slow EMA predicts."""
SAMPLES = 12
DROPPED = 2
"""First samples of each phase, which compile."""
SCHEDULE: dict[str, Any] = {
    "warmup_steps": SAMPLES + DROPPED,
    "full_steps": SAMPLES + DROPPED,
    "max_predict_steps": SAMPLES + DROPPED,
    "correction_interval": 1,
    "confidence_threshold": 0.0,
    "predictor": "slow_ema",
}
"""Every phase often enough, whatever the model's confidence."""
SCHEDULE_STEPS = 4 * (SAMPLES + DROPPED)
CYCLES = 10


@dataclass
class Samples:
    """Times of one kind of step in milliseconds, and what it launched."""

    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)


@dataclass
class StepRow(Row):
    """One kind of step.

    Attributes:
        dtype: Of parameters and gradients.
        optimizer: Which, and its options.
        phase: Of the step.
        device: Milliseconds that the device works. `HybridOptimizer` is measured with
            ``capturable=True``, where it never waits for the host.
        host: Milliseconds that the host is inside the step, from an idle device, in the
            default mode: once a cycle it waits for the device there.
        host_capturable: The same with ``capturable=True``.
        launches: Triton kernels; those of torch are not counted.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        "dtype", "optimizer", "phase", "device ms (p20-p80)", "host ms (p20-p80)",
        "no wait", "Triton launches",
    )  # fmt: skip
    dtype: str
    optimizer: str
    phase: str
    device: Timing | None
    host: Timing
    host_capturable: Timing | None = None
    launches: list[int] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        no_wait = f"{self.host_capturable.median:.3f}" if self.host_capturable else UNKNOWN
        launches = "/".join(map(str, self.launches)) or UNKNOWN
        device = str(self.device) if self.device else UNKNOWN
        return self.dtype, self.optimizer, self.phase, device, str(self.host), no_wait, launches


class Workload:
    """GPT-2 small's parameters with gradients that are part signal, part noise.

    Args:
        dtype: Of parameters and gradients.
        device: Where.
        gradients: How many different ones there are.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, gradients: int = 2) -> None:
        shapes = gpt2_small_shapes()

        def normal(size: float) -> list[Tensor]:
            return [torch.randn(s, device=device).mul_(size).to(dtype) for s in shapes]

        self.params = [nn.Parameter(value) for value in normal(0.02)]
        signal = normal(1e-3)
        self._gradients = [
            [s + noise for s, noise in zip(signal, normal(1e-3))] for _ in range(gradients)
        ]
        self._next = 0
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.refill()

    def refill(self) -> None:
        """The next gradient, at the same addresses as the one before."""
        self._next = (self._next + 1) % len(self._gradients)
        grads = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(grads, self._gradients[self._next])


class MasterAdamW:
    """What AdamW needs to keep the promise of FP32 masters, as it is usually written.

    Args:
        params: 16-bit parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._masters = [nn.Parameter(param.detach().float()) for param in params]
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-4, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Gradients to the masters, one step, masters to the parameters."""
        grads = [param.grad for param in self._params if param.grad is not None]
        wide = [master.grad for master in self._masters if master.grad is not None]
        torch._foreach_copy_(wide, grads)
        self._adamw.step()
        torch._foreach_copy_(self._params, [master.detach() for master in self._masters])


def optimizer_steps(context: Context, result: SectionResult) -> None:
    """Measures AdamW and every phase of `HybridOptimizer`, in FP32 and BF16."""
    for label in ("fp32", "bf16"):
        if not context.has_room(result, f"steps, {label}", 10 << 30):
            continue
        work = Workload(DTYPES[label], context.device)
        for name, step in baselines(label, work.params).items():
            context.check_time()
            samples = plain_samples(step, work.refill)
            row = StepRow(label, name, "step", Timing.of(samples.device), Timing.of(samples.host))
            result.rows.append(row)
            del step
            release_memory()
        for name, options, kernels in hybrids():
            context.check_time()
            measure_hybrid(context, result, label, work, name, options, kernels)
            release_memory()
        context.check_time()
        measure_inline(context, result, label, work)
        del work
        release_memory()


def baselines(label: str, params: list[nn.Parameter]) -> dict[str, Step]:
    """The optimizers to compare with, by name."""
    steps: dict[str, Step] = {
        "AdamW fused": torch.optim.AdamW(params, lr=1e-4, fused=True).step,
        "AdamW foreach": torch.optim.AdamW(params, lr=1e-4, foreach=True).step,
    }
    if label != "fp32":
        steps = {f"{name}, no masters": step for name, step in steps.items()}
        steps["AdamW fused, masters"] = MasterAdamW(params).step
    return steps


def hybrids() -> list[tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]]:
    """Name, options and kernels by phase of what is measured phase by phase."""
    clipped: dict[str, tuple[str, ...]] = {"full": ("adamw+clip+slow",)}
    none = {"hybrid": HybridConfig(predictor="none", inline=False)}
    stepped = {"hybrid": HybridConfig(**SCHEDULE, inline=False)}
    return [
        ("hybrid none", none, {"full": ("adamw",)}),
        ("hybrid slow_ema", stepped, PHASE_KERNELS),
        ("hybrid slow_ema, clipped", {**stepped, "max_grad_norm": 1.0}, clipped),
    ]


def plain_samples(step: Step, refill: Step) -> Samples:
    """Times of a step that has no phases and never waits for the device."""
    samples = Samples()
    for _ in range(SAMPLES + DROPPED):
        samples.host.append(host_time(step, refill))
    samples.host = samples.host[DROPPED:]
    pause = 3e-3 * sorted(samples.host)[len(samples.host) // 2]
    samples.device = [device_time(step, refill, pause)[0] for _ in range(SAMPLES)]
    return samples


def host_time(step: Step, refill: Step) -> float:
    """Milliseconds of the host inside one step, from an idle device."""
    refill()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    elapsed = 1e3 * (time.perf_counter() - started)
    torch.cuda.synchronize()
    return elapsed


def device_time(step: Step, refill: Step, pause: float) -> tuple[float, float]:
    """Milliseconds of the device and of the host for one step that does not wait."""
    start, stop = new_event(), new_event()
    refill()
    torch.cuda.synchronize()
    occupy(pause)
    start.record()
    started = time.perf_counter()
    step()
    elapsed = 1e3 * (time.perf_counter() - started)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop), elapsed


def phase_samples(
    params: Sequence[Tensor], refill: Step, options: dict[str, Any], pause: float | None
) -> dict[str, Samples]:
    """Drives one optimizer through `SCHEDULE`, and sorts its steps by phase.

    Args:
        params: What it steps.
        refill: Makes the next gradient.
        options: Of `HybridOptimizer`.
        pause: Seconds by which the host gets ahead, to measure the device; None measures
            the host alone.
    """
    optimizer = HybridOptimizer(params, lr=1e-4, **options)
    found: dict[str, Samples] = {}
    launches = Launches()
    for _ in range(SCHEDULE_STEPS):
        samples = found.setdefault(optimizer.phase.value, Samples())
        if pause is None:
            samples.host.append(host_time(optimizer.step, refill))
            continue
        launches.names.clear()
        with launches.counted():
            device, host = device_time(optimizer.step, refill, pause)
        samples.device.append(device)
        samples.host.append(host)
        samples.launches.append(len(launches.names))
    for samples in found.values():
        del samples.host[:DROPPED], samples.device[:DROPPED], samples.launches[:DROPPED]
    return {phase: samples for phase, samples in found.items() if samples.host}


def measure_hybrid(
    context: Context,
    result: SectionResult,
    label: str,
    work: Workload,
    name: str,
    options: dict[str, Any],
    kernels: dict[str, tuple[str, ...]],
) -> None:
    """Measures every phase of one `HybridOptimizer`, in two runs.

    The first, in the default mode, gives the host's time; the second never waits for the
    device, so its host can be kept ahead, and the events see the device alone.
    """
    default = phase_samples(work.params, work.refill, options, None)
    slowest = max(Timing.of(samples.host).median for samples in default.values())
    release_memory()
    capturable = {**options, "capturable": True}
    ahead = phase_samples(work.params, work.refill, capturable, 3e-3 * slowest)
    for phase, needed in kernels.items():
        what = f"{name}, {phase}, {label}"
        if context.refuses(result, what, needed, label):
            continue
        if phase not in default or phase not in ahead:
            result.skipped.append(Skip(what, "the phase was not reached"))
            continue
        row = StepRow(
            label, name, phase, Timing.of(ahead[phase].device), Timing.of(default[phase].host),
            Timing.of(ahead[phase].host), sorted(set(ahead[phase].launches)),
        )  # fmt: skip
        result.rows.append(row)


def measure_inline(context: Context, result: SectionResult, label: str, work: Workload) -> None:
    """The mean call over whole cycles of the default drive: predictions run inside."""
    name = "hybrid slow_ema, inline"
    needed = [kernel for kernels in PHASE_KERNELS.values() for kernel in kernels]
    if context.refuses(result, f"{name}, {label}", needed, label):
        return
    config = HybridConfig(
        warmup_steps=5, predictor="slow_ema", confidence_threshold=0.0, inline=True
    )
    optimizer = HybridOptimizer(work.params, lr=1e-4, hybrid=config)
    # One Full step, and a Correct step after each prediction.
    calls = 1 + config.max_predict_steps // config.correction_interval
    for _ in range(config.warmup_steps + config.full_steps + 2 * calls):
        work.refill()
        optimizer.step()
    before = optimizer.stats()
    host, device = [], []
    for _ in range(CYCLES):
        pairs = [device_time(optimizer.step, work.refill, 0.0) for _ in range(calls)]
        device.append(sum(pair[0] for pair in pairs) / calls)
        host.append(sum(pair[1] for pair in pairs) / calls)
    after = optimizer.stats()
    result.rows.append(
        StepRow(label, name, "mean call of a cycle", Timing.of(device), Timing.of(host))
    )
    result.facts[f"inline cycle {label}"] = {
        "calls_per_cycle": calls,
        "cycles": CYCLES,
        "predicted_steps": after.predicted_steps - before.predicted_steps,
        "rollbacks": after.rollbacks - before.rollbacks,
        "note": "device: from the call to its last kernel, waiting for the host included",
    }
