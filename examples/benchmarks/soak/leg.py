"""The soak run itself: a small model, and everything that happens to its optimizer."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from soak.measure import Kind, Sample, measure
from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups
from triton_hybrid.rules import RULES
from triton_hybrid.standing import weight_after

HYBRID, ADAMW = "hybrid", "adamw"
DRIVES = ("stepped", "inline")
ROUND = 25  # steps from one sample to the next
# Step of a round after which the optimizer stays the same: a sample must find it with everything
# bound that it binds, or it would not be equal to the next.
QUIET_FROM = 11
EMPTY_STEP = 3  # of a round: no parameter has a gradient
NONFINITE_EVERY = 23
# Which Correct steps of how many are made to fail, and how.
DIVERGENCE_CYCLE, DIVERGENCES = 12, {3: "infinite loss", 9: "huge gradient"}
HUGE = 1e6
GRADIENT_CHANGES = ("set to None", "norm and embedding None", "other memory order", "matrix None",
                    "zeroed in place")  # fmt: skip
VOCABULARY, WIDTH, HIDDEN, BATCH = 64, 48, 96, 16
LEARNING_RATE = 2e-3


class SoakModel(nn.Module):
    """A next-token model with FP32 and BF16 parameters in both groups of Muon and AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.widen = nn.Linear(WIDTH, HIDDEN)
        self.narrow = nn.Linear(HIDDEN, WIDTH, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the tokens that follow."""
        hidden = torch.nn.functional.gelu(self.widen(self.embedding(tokens)))
        hidden = self.norm(self.narrow(hidden.bfloat16()).float())
        logits: Tensor = self.head(hidden.bfloat16()).float()
        return logits


@dataclass(frozen=True)
class Leg:
    """A part of the run, with a model of its own."""

    subject: str  # "hybrid", or "adamw" for the control
    predictor: str
    drives: tuple[str, ...]  # taken in turn at every round trip
    steps: int
    first_step: int  # how many were made before
    seed: int  # of weights and batches
    device: torch.device
    backend: str = "auto"
    offload: str = "none"

    @property
    def name(self) -> str:
        """What it is called where it is shown."""
        return "AdamW" if self.subject == ADAMW else self.predictor


@dataclass
class LegReport:
    """What happened in a leg."""

    leg: str
    counts: Counter[str] = field(default_factory=Counter)  # what was done to the optimizer
    round_trips_by_phase: Counter[str] = field(default_factory=Counter)  # through a state dict
    stats: dict[str, Any] = field(default_factory=dict)  # what the optimizer reports at the end
    wrong: list[str] = field(default_factory=list)  # what was not as it should be


def run_leg(
    leg: Leg,
    take: Callable[[Sample, Counter[Kind]], None],
    after_step: Callable[[SoakRunner], None],
) -> LegReport:
    """Runs a leg; `take` is called with every sample, `after_step` after every step."""
    runner = SoakRunner(leg)
    for index in range(leg.steps):
        in_round, number = index % ROUND, index // ROUND
        # It moves through the round, to meet every phase and the middle of a stretch.
        if in_round == number % QUIET_FROM:
            runner.round_trip()
        runner.step(empty=in_round == EMPTY_STEP)
        after_step(runner)
        if in_round == ROUND - 1:
            take(*runner.sample(index + 1))
    runner.finish()
    return runner.report


class SoakRunner:
    """A model and its optimizer on their way through a leg."""

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self.report = LegReport(leg.name)
        torch.manual_seed(leg.seed)
        self.model = SoakModel().to(leg.device)
        self._generator = torch.Generator().manual_seed(leg.seed)
        # A permutation as the language: what can be learned is learned, and noise remains.
        self._next = torch.randperm(VOCABULARY, generator=self._generator)
        self.drive = leg.drives[0]
        self.optimizer = self._build()
        self.gradients = 0

    @property
    def hybrid(self) -> HybridOptimizer | None:
        """The optimizer; None in the control."""
        return self.optimizer if isinstance(self.optimizer, HybridOptimizer) else None

    @property
    def phase(self) -> str:
        """Phase of the coming step."""
        return self.hybrid.phase.value if self.hybrid else "step"

    def _build(self) -> torch.optim.Optimizer:
        leg = self.leg
        if leg.subject == ADAMW:
            params = self.model.parameters()
            adamw: torch.optim.Optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE)
            return adamw
        config = HybridConfig(
            warmup_steps=4, full_steps=3, max_predict_steps=4, correction_interval=2,
            confidence_threshold=0.0, predictor=leg.predictor, history=3,
            inline=self.drive == "inline", offload=leg.offload,
        )  # fmt: skip
        groups = split_param_groups(self.model, lr=LEARNING_RATE)
        return HybridOptimizer(groups, hybrid=config, backend=leg.backend)

    def _bits(self, of_state: bool = False) -> dict[tuple[str, str], bytes]:
        """The weights, or all tensors of the state, as bytes: NaN would equal nothing."""
        found = {}
        for name, param in self.model.named_parameters():
            values = self.optimizer.state.get(param, {}) if of_state else {"weight": param}
            for key, value in values.items():
                if isinstance(value, Tensor):
                    flat = value.detach().reshape(-1).view(torch.uint8)
                    found[name, key] = flat.cpu().numpy().tobytes()
        return found

    def round_trip(self) -> None:
        """Saves the optimizer, reads it back, and goes on with a new one in the next drive."""
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), buffer)
        buffer.seek(0)
        weights, state, phase = self._bits(), self._bits(of_state=True), self.phase
        drives = self.leg.drives
        self.drive = drives[(drives.index(self.drive) + 1) % len(drives)]
        self.optimizer = self._build()
        self.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        self.report.counts["round trips"] += 1
        self.report.round_trips_by_phase[phase] += 1
        # Inline, every step has a gradient: a stepped stretch ends where it was saved.
        cut_off = phase == Phase.PREDICT.value and self.drive == "inline"
        expected = (Phase.CORRECT.value, Phase.FULL.value) if cut_off else (phase,)
        same = weights == self._bits() and state == self._bits(of_state=True)
        if self.phase not in expected or not same:
            self._complain(f"a round trip in phase {phase} changed phase, state or weights")

    def step(self, empty: bool = False) -> None:
        """One step, with whatever comes in its way; `empty` where no parameter has a gradient."""
        optimizer, counts, hybrid = self.optimizer, self.report.counts, self.hybrid
        counts["steps"] += 1
        counts[f"phase {self.phase}"] += 1
        if hybrid is not None and not hybrid.needs_backward:
            before = self._bits()
            hybrid.step()
            counts["predictions that moved the weights"] += before != self._bits()
            return
        if empty:
            optimizer.zero_grad()
            counts["no gradient at all"] += 1
            optimizer.step()
            return
        tokens = torch.randint(VOCABULARY, (BATCH,), generator=self._generator)
        logits = self.model(tokens.to(self.leg.device))
        loss = nn.functional.cross_entropy(logits, self._next[tokens].to(self.leg.device))
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradients += 1
        poisoned = self.gradients % NONFINITE_EVERY == 0
        # Such a gradient is skipped, and judges nothing.
        observed = loss.detach() if poisoned else self._diverge(loss.detach())
        kind = self._change_gradients()
        if poisoned:
            counts["non-finite gradient"] += 1
            grad = self.model.widen.weight.grad
            assert grad is not None
            grad[0, 0] = math.nan if self.gradients % 2 else math.inf
        if hybrid is not None:
            hybrid.observe_loss(observed)
        # AdamW would take such a gradient; a training loop that looks would skip the step.
        if hybrid is not None or not poisoned:
            optimizer.step()
        optimizer.zero_grad(set_to_none=kind != "zeroed in place")

    def _diverge(self, loss: Tensor) -> Tensor:
        """Now and then makes a Correct step one that must take its prediction back."""
        counts = self.report.counts
        if self.phase != "correct":
            return loss
        cause = DIVERGENCES.get(counts["judged"] % DIVERGENCE_CYCLE)
        counts.update(["judged"] if cause is None else ["judged", cause])
        if cause == "huge gradient":
            for param in self.model.parameters():
                if param.grad is not None:
                    param.grad.mul_(HUGE)
        return torch.full_like(loss, math.inf) if cause == "infinite loss" else loss

    def _change_gradients(self) -> str:
        model = self.model
        kind = GRADIENT_CHANGES[self.gradients % len(GRADIENT_CHANGES)]
        self.report.counts[kind] += 1
        if kind == "norm and embedding None":
            model.embedding.weight.grad = None
            model.norm.weight.grad = model.norm.bias.grad = None
        elif kind == "matrix None":
            model.narrow.weight.grad = None
        elif kind == "other memory order":
            for param in model.parameters():
                if param.grad is not None and param.ndim == 2:
                    param.grad = param.grad.t().contiguous().t()
        return kind

    def sample(self, leg_step: int) -> tuple[Sample, Counter[Kind]]:
        """Measures memory after so many steps of this leg, with no gradient alive."""
        self.optimizer.zero_grad(set_to_none=True)
        self._look()
        engine = self.hybrid._engine if self.hybrid is not None else None
        for batch in engine.batches if engine is not None else ():
            # Which patterns of missing gradients are known, 8 at most, depends on the last trip.
            batch.tensors._chunks.clear()
        return measure(
            self.leg.device, step=self.leg.first_step + leg_step, leg=self.leg.name,
            leg_step=leg_step, drive=self.drive, phase=self.phase, state_bytes=self.state_bytes(),
        )  # fmt: skip

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        if self.hybrid is not None:
            stats = self.hybrid.stats()
            return stats.state_bytes_device + stats.state_bytes_host
        entries = self.optimizer.state.values()
        tensors = [t for entry in entries for t in entry.values() if isinstance(t, Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _look(self) -> None:
        """Whether the weights are what they should be."""
        if self.hybrid is not None and self.leg.offload != "none":
            self.hybrid._binding.save(self.optimizer.param_groups)  # what visits is newer than home
        for name, param in self.model.named_parameters():
            if not bool(param.detach().isfinite().all()):
                self._complain(f"{name} is not finite in phase {self.phase}")
            master = self.optimizer.state[param].get("master")
            if master is not None and self.hybrid is not None:
                # A prediction may stand in the parameter alone.
                entry, binding = self.optimizer.state[param], self.hybrid._binding
                progress, engine = binding.progress, binding.engine
                ledger = progress.ledger if engine is None else engine.read()
                # One that was undone at once leaves its numbers behind.
                if progress.controller.stands and ledger.get("moved", 0.0) > 0:
                    its = {
                        id(p): g["base"] for g in self.optimizer.param_groups for p in g["params"]
                    }
                    rule = RULES[its[id(param)]].kernels
                    master = weight_after(param.detach(), entry, rule)
            if master is not None and not torch.equal(param.detach(), master.to(param.dtype)):
                self._complain(f"{name} is not its master, rounded, in phase {self.phase}")

    def finish(self) -> None:
        """Compares what the optimizer counted with what was done to it."""
        if self.hybrid is None:
            return
        report, stats = self.report, self.hybrid.stats()
        report.stats = stats.to_dict()
        for name, given, value in (
            ("gradient_evaluations", stats.gradient_evaluations, self.gradients),
            ("skipped_nonfinite", stats.skipped_nonfinite, report.counts["non-finite gradient"]),
        ):
            if given != value:
                self._complain(f"stats().{name} is {given}, should be {value}")
        forced = report.counts["infinite loss"] + report.counts["huge gradient"]
        if stats.rollbacks < forced:
            self._complain(f"{forced} predictions had to be taken back, {stats.rollbacks} were")
        # The inline drive predicts out of sight.
        if "stepped" in self.leg.drives and not report.counts["predictions that moved the weights"]:
            self._complain(f"no prediction moved the weights; horizon {stats.horizon}")
        if not stats.horizon > 0:
            self._complain(f"stats().horizon is {stats.horizon}, should be above 0")
        for phase, count in stats.steps_per_phase.items():
            if not count:
                self._complain(f"no step in phase {phase}: more steps are needed")

    def _complain(self, text: str) -> None:
        text = f"{self.leg.name}, {self.drive}: {text}"
        if text not in self.report.wrong:
            self.report.wrong.append(text)
