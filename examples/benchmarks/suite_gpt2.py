"""Section 5: GPT-2 small end to end, and which share of a step the optimizer has."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from suite_context import Context, release_memory
from suite_gpt2_shapes import PARAMETERS
from suite_records import Row, SectionResult, Skip, Timing
from suite_steps import PHASE_KERNELS
from suite_timing import new_event

from triton_hybrid import HybridConfig, HybridOptimizer

BATCHES: tuple[tuple[int, int, bool], ...] = ((4, 64, False), (16, 1024, True))
"""Sequences, tokens of each, and whether the forward pass runs in BF16 autocast."""
ENOUGH = 8
"""Samples of the rarest phase after which a run may end."""
MOST_STEPS = 120
DROPPED = 1
CONFIG = HybridConfig(
    warmup_steps=ENOUGH + DROPPED, full_steps=ENOUGH + DROPPED, max_predict_steps=MOST_STEPS,
    divergence_threshold=8.0, confidence_threshold=0.0, predictor="slow_ema", inline=False,
)  # fmt: skip


@dataclass
class TrainingRow(Row):
    """One kind of training step, in milliseconds between events on the device.

    Attributes:
        batch: Sequences x tokens, and the precision of the forward pass.
        optimizer: Which.
        phase: Of the step.
        forward: Forward pass and loss; 0 in a Predict step.
        backward: Backward pass; 0 in a Predict step.
        step: The optimizer's step.
        share: The optimizer's part of the three.
        samples: How many steps.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        "batch", "optimizer", "phase", "forward ms", "backward ms", "step ms (p20-p80)",
        "share", "steps",
    )  # fmt: skip
    batch: str
    optimizer: str
    phase: str
    forward: Timing
    backward: Timing
    step: Timing
    share: float
    samples: int

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        return (
            self.batch, self.optimizer, self.phase, f"{self.forward.median:.2f}",
            f"{self.backward.median:.2f}", str(self.step), f"{100 * self.share:.1f}%",
            str(self.samples),
        )  # fmt: skip


def gpt2_training(context: Context, result: SectionResult) -> None:
    """Trains on random tokens, with AdamW and with every phase of `HybridOptimizer`."""
    try:
        import transformers
    except ImportError as error:
        result.skipped.append(Skip("GPT-2 small", f"transformers is not installed: {error}"))
        return
    result.facts["transformers"] = transformers.__version__
    for sequences, tokens, mixed in BATCHES:
        batch = f"{sequences}x{tokens} {'bf16 autocast' if mixed else 'fp32'}"
        # Weights, gradients and state take 3.5 GiB; the logits are kept several times over.
        needed = (4 << 30) + 6 * 4 * sequences * tokens * 50257
        for name in ("AdamW fused", "hybrid slow_ema"):
            context.check_time()
            if not context.has_room(result, f"{name}, {batch}", needed):
                continue
            try:
                steps = Training(context, sequences, tokens, mixed).run(name)
            except torch.cuda.OutOfMemoryError as error:
                reason = f"out of device memory: {str(error).splitlines()[0][:80]}"
                result.skipped.append(Skip(f"{name}, {batch}", reason))
                continue
            finally:
                release_memory()
            add_rows(context, result, batch, name, steps)


@functools.cache
def template() -> Any:
    """GPT-2 small with random weights, fused attention and no dropout; made once, on the CPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    # A private name, but the one that every version since 4.36 reads; from_config sets it too.
    config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers warns when it has to guess
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != PARAMETERS:
        raise RuntimeError(f"GPT-2 small has {count} parameters, must be {PARAMETERS}")
    return model.train()


class Training:
    """A model, and random tokens to train it on."""

    def __init__(self, context: Context, sequences: int, tokens: int, mixed: bool) -> None:
        self.context = context
        torch.manual_seed(context.seed)
        self.model = copy.deepcopy(template()).to(context.device)
        self.attention = getattr(self.model.config, "_attn_implementation", None)
        shape = (4, sequences, tokens)
        self.batches = torch.randint(50257, shape, device=context.device)
        self.mixed = mixed

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """The optimizer of that name."""
        if name == "AdamW fused":
            return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        return HybridOptimizer(self.model.parameters(), lr=1e-4, hybrid=CONFIG)

    def run(self, name: str) -> dict[str, Any]:
        """Trains until every phase was seen often enough.

        Returns:
            By phase a list of forward, backward and step milliseconds, and facts of the run.
        """
        optimizer = self.optimizer(name)
        hybrid = optimizer if isinstance(optimizer, HybridOptimizer) else None
        phases = {"step": 0} if hybrid is None else dict.fromkeys(PHASE_KERNELS, 0)
        events: list[tuple[str, list[torch.cuda.Event]]] = []
        loss = torch.zeros((), device=self.context.device)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for number in range(MOST_STEPS):
            self.context.check_time()
            phase = "step" if hybrid is None else hybrid.phase.value
            marks = [new_event() for _ in range(4)]
            marks[0].record()
            wanted = hybrid is None or hybrid.needs_backward
            if wanted:
                loss = self.loss(number)
            marks[1].record()
            if wanted:
                loss.backward()  # type: ignore[no-untyped-call]
                if hybrid is not None:
                    hybrid.observe_loss(loss.detach())
            marks[2].record()
            optimizer.step()
            marks[3].record()
            optimizer.zero_grad(set_to_none=True)
            events.append((phase, marks))
            phases[phase] += 1
            if min(phases.values()) >= ENOUGH + DROPPED:
                break
            if number % 16 == 15:
                # Not further ahead than this, so that the check of the time means something.
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        by_phase: dict[str, list[tuple[float, float, float]]] = {}
        for phase, (first, second, third, last) in events:
            times = (
                first.elapsed_time(second), second.elapsed_time(third), third.elapsed_time(last),
            )  # fmt: skip
            by_phase.setdefault(phase, []).append(times)
        facts = {
            "steps": len(events),
            "seconds": seconds,
            "attention": self.attention,
            "last_loss": float(loss.detach()),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "stats": hybrid.stats().to_dict() if hybrid is not None else None,
        }
        return {"phases": by_phase, "facts": facts}

    def loss(self, number: int) -> torch.Tensor:
        """The forward pass of one batch."""
        ids = self.batches[number % len(self.batches)]
        precision: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.mixed:
            precision = torch.autocast("cuda", dtype=torch.bfloat16)
        with precision:
            loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def add_rows(
    context: Context, result: SectionResult, batch: str, name: str, run: dict[str, Any]
) -> None:
    """Summarises a run phase by phase."""
    counted = [times for by_phase in run["phases"].values() for times in by_phase[DROPPED:]]
    total = sum(map(sum, counted))
    run["facts"]["optimizer_share_of_all_steps"] = (
        sum(times[2] for times in counted) / total if total else None
    )
    result.facts[f"{name}, {batch}"] = run["facts"]
    for phase, times in run["phases"].items():
        kernels = PHASE_KERNELS.get(phase, ())
        if context.refuses(result, f"{name}, {phase}, {batch}", kernels, "fp32"):
            continue
        if len(times) <= DROPPED:
            result.skipped.append(Skip(f"{name}, {phase}, {batch}", "too few steps"))
            continue
        forward, backward, step = (Timing.of(column) for column in zip(*times[DROPPED:]))
        whole = forward.median + backward.median + step.median
        share = step.median / whole if whole else 0.0
        samples = len(times) - DROPPED
        row = TrainingRow(batch, name, phase, forward, backward, step, share, samples)
        result.rows.append(row)
