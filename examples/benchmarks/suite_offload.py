"""Section 8: state in host memory: the same bits, what is left on the device, and what it costs."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from suite_context import ANY, Context
from suite_gpt2 import Training
from suite_gpt2_shapes import PARAMETERS
from suite_problems import different_bits
from suite_records import Check, Row, SectionResult, Skip, Timing
from suite_timing import new_event
from torch import Tensor, nn

from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.config import OFFLOADS

LONG: dict[str, Any] = {
    "warmup_steps": 2, "full_steps": 2, "max_predict_steps": 7, "correction_interval": 7,
    "confidence_threshold": 0.0, "history": 3, "inline": False,
}  # fmt: skip
"""Stretches so long that the moments of a trajectory's predictions leave the device."""
STEPS = 40
SIDE = 512
"""Rows and columns of the checked matrices: large enough for copies to be under way for a while."""
MOST_BYTES = 0.1
"""Bytes a parameter beyond AdamW's own that may stay on the device between two steps."""
SEQUENCES, TOKENS = 16, 1024
DROPPED, SAMPLES = 6, 12


@dataclass
class OffloadRow(Row):
    """Training GPT-2 small with state in one kind of memory.

    Attributes:
        offload: As in HybridConfig; "AdamW fused" for torch's.
        between: Device bytes a parameter between two steps, parameters included.
        peak: The most, activations included.
        whole: Milliseconds of forward pass, backward pass and step.
        step: Milliseconds of the step alone.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        "offload", "B/param between steps", "B/param at the peak", "whole ms (p20-p80)",
        "step ms (p20-p80)",
    )  # fmt: skip
    offload: str
    between: float
    peak: float
    whole: Timing
    step: Timing

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        return (
            self.offload, f"{self.between:.2f}", f"{self.peak:.2f}", str(self.whole), str(self.step)
        )  # fmt: skip


def offload(context: Context, result: SectionResult) -> None:
    """Checks that offloading changes no bit, and measures what it saves and costs."""
    for predictor in ("slow_ema", "subspace", "auto"):
        context.check_time()
        usual, _ = checked_run(context, predictor, "none")
        for kind in OFFLOADS[1:]:
            context.check_time()
            other, beyond = checked_run(context, predictor, kind)
            different = different_bits(usual, other)
            detail = f"{different} elements differ" if different else ""
            name = f"{predictor}, {kind}"
            context.note(
                result,
                Check(f"{name}: same bits", "", ANY, not different, different, 0.0, detail),
            )
            context.note(
                result,
                Check(
                    f"{name}: B/param between steps", "", ANY, beyond <= MOST_BYTES, beyond,
                    MOST_BYTES,
                ),
            )  # fmt: skip
    for name in ("AdamW fused", *OFFLOADS):
        context.check_time()
        needed = (6 << 30) + 6 * 4 * SEQUENCES * TOKENS * 50257
        if context.has_room(result, f"GPT-2 small, {name}", needed):
            try:
                result.rows.append(trained(context, name))
            except ImportError as error:
                result.skipped.append(Skip("GPT-2 small", f"not installed: {error}"))
                return


def checked_run(context: Context, predictor: str, kind: str) -> tuple[list[Tensor], float]:
    """Trains two layers through every phase, with windows of one or two backward passes.

    Returns:
        Parameters and state at the end, and the most bytes a parameter beyond AdamW's own that
        were on the device between two steps.
    """
    device = context.device
    torch.manual_seed(context.seed)
    with device:
        model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE))
        inputs, targets = torch.randn(256, SIDE), torch.randn(256, SIDE)
    config = HybridConfig(**LONG, predictor=predictor, offload=kind)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-3, hybrid=config)
    count = sum(param.numel() for param in model.parameters())
    beyond = 0.0
    for number in range(STEPS):
        if optimizer.needs_backward:
            for _ in range(1 + number // 7 % 2):
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.observe_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if optimizer.needs_backward:
            stats = optimizer.stats()
            beyond = max(beyond, stats.state_bytes_device / count - 8.0)
    optimizer.state_dict()
    state = [
        value.detach().cpu()
        for param in model.parameters()
        for _, value in sorted(optimizer.state[param].items())
        if isinstance(value, Tensor)
    ]
    return [*(param.detach().cpu() for param in model.parameters()), *state], beyond


class OffloadTraining(Training):
    """GPT-2 small with the default configuration, its state in one kind of memory."""

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW, or HybridOptimizer with ``offload`` of that name."""
        if name == "AdamW fused":
            return super().optimizer(name)
        config = dataclasses.replace(HybridConfig(), offload=name)
        return HybridOptimizer(self.model.parameters(), lr=1e-4, hybrid=config)


def trained(context: Context, name: str) -> OffloadRow:
    """Trains for a few steps, and measures them."""
    training = OffloadTraining(context, SEQUENCES, TOKENS, mixed=True)
    optimizer = training.optimizer(name)
    wholes: list[float] = []
    steps: list[float] = []
    between = 0
    for number in range(DROPPED + SAMPLES):
        context.check_time()
        if number == DROPPED:
            torch.cuda.reset_peak_memory_stats(context.device)
        start, before, after = new_event(), new_event(), new_event()
        start.record()
        training.loss(number).backward()  # type: ignore[no-untyped-call]
        before.record()
        optimizer.step()
        after.record()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        gc.collect()
        between = max(between, torch.cuda.memory_allocated(context.device))
        wholes.append(start.elapsed_time(after))
        steps.append(before.elapsed_time(after))
    return OffloadRow(
        name,
        between / PARAMETERS,
        torch.cuda.max_memory_allocated(context.device) / PARAMETERS,
        Timing.of(wholes[DROPPED:]),
        Timing.of(steps[DROPPED:]),
    )
