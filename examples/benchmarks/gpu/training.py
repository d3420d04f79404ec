"""Sections: an optimizer's step in every phase beside AdamW's, and its share of training GPT-2."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpu.context import Context, parameters
from gpu.timing import Clock, mark, ratios, spread, turns
from lib.gpt2_shapes import PARAMETERS, VOCABULARY, gpt2_small_shapes
from triton_hybrid import HybridConfig, HybridOptimizer, Phase, split_param_groups

REFERENCE = "AdamW fused"
WAITS = "hybrid slow_ema, host decides"  # once a cycle, so the host cannot get ahead
ROUNDS = 12
MOST_STEPS = 8  # in which every phase must have been seen
BYTES = 9 * 36  # of a parameter: nine optimizers, each with parameters of its own
CHAIN = "unscale, clip, AdamW fused"
SCALED = "hybrid none, unscaled, clipped"
LIMIT_OF_CHAIN = 0.6  # what the latter may take of the former, in 16 bits with masters
SCALE = 1024.0
SMALL = ((24, 16), (24,), (16, 7))
PLAIN = HybridConfig(warmup_steps=0, predictor="none")
STEPPED = HybridConfig(
    warmup_steps=1, full_steps=1, max_predict_steps=1, divergence_threshold=1e6,
    confidence_threshold=0.0, predictor="slow_ema", inline=False,
)  # fmt: skip
"""Every phase in every round of a few steps; nothing is rejected: the times would be those of
roll-backs."""


class MasterAdamW:
    """What AdamW needs to keep the promise of FP32 masters, as it is usually written.

    Args:
        params: Parameters with gradients, in 16 bits.
        scaled: Whether gradients are unscaled and clipped, too, as a GradScaler and torch do it.
    """

    def __init__(self, params: Sequence[Tensor], scaled: bool = False) -> None:
        self._params, self._scaled = list(params), scaled
        self._masters = [nn.Parameter(param.detach().float()) for param in params]
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-4, fused=True)
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self._found, self._inverse = (
            torch.full((), value, device=params[0].device) for value in (0.0, 1.0 / SCALE)
        )

    @torch.no_grad()
    def step(self) -> None:
        """Gradients to the masters, one step, masters to the parameters."""
        wide = [master.grad for master in self._masters if master.grad is not None]
        torch._foreach_copy_(wide, [p.grad for p in self._params if p.grad is not None])
        if self._scaled:
            torch._amp_foreach_non_finite_check_and_unscale_(wide, self._found, self._inverse)
            nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adamw.step()
        torch._foreach_copy_(self._params, [master.detach() for master in self._masters])


class Workload:
    """Parameters for each optimizer, and for all of them gradients: part signal, part noise."""

    def __init__(self, context: Context, dtype: torch.dtype) -> None:
        self._context, self._dtype, self._number = context, dtype, 0
        self._shapes = gpt2_small_shapes() if context.on_gpu else SMALL
        signal, *noise = (context.normal(self._shapes, 1e-3, i, dtype) for i in range(3))
        self._gradients = [torch._foreach_add(signal, each) for each in noise]
        self._present = [torch.zeros_like(gradient) for gradient in self._gradients[0]]

    def parameters(self) -> list[nn.Parameter]:
        """New parameters with the gradients of all."""
        values = self._context.normal(self._shapes, 0.02, dtype=self._dtype)
        return parameters(values, self._present)

    def refill(self) -> None:
        """The next gradient, at the same addresses as the one before."""
        self._number = 1 - self._number
        torch._foreach_copy_(self._present, self._gradients[self._number])


def steps(context: Context) -> None:
    """Measures AdamW and every phase of `HybridOptimizer`, in FP32 and BF16."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if context.has_room(f"steps, {name}", BYTES * PARAMETERS):
            work = Workload(context, dtype)
            measure(context, work, name, contenders(work, dtype != torch.float32))
            del work


def contenders(work: Workload, masters: bool) -> dict[str, Any]:
    """Every optimizer, by name; those of torch have no masters but for one."""

    def hybrid(config: HybridConfig, **options: Any) -> HybridOptimizer:
        options |= {"lr": 1e-4, "hybrid": config, "backend": "triton"}
        return HybridOptimizer(work.parameters(), **options)

    extra = ", no masters" * masters
    usual: dict[str, Any] = {}
    if masters:
        usual[REFERENCE] = MasterAdamW(work.parameters())
        usual[CHAIN] = MasterAdamW(work.parameters(), scaled=True)
        usual[SCALED] = hybrid(PLAIN, capturable=True, max_grad_norm=1.0, loss_scale=SCALE)
    return {
        **usual,
        f"{REFERENCE}{extra}": torch.optim.AdamW(work.parameters(), lr=1e-4, fused=True),
        f"AdamW foreach{extra}": torch.optim.AdamW(work.parameters(), lr=1e-4, foreach=True),
        "hybrid none": hybrid(PLAIN, capturable=True),
        "hybrid slow_ema": hybrid(STEPPED, capturable=True),
        "hybrid slow_ema, clipped": hybrid(STEPPED, capturable=True, max_grad_norm=1.0),
        WAITS: hybrid(STEPPED),
    }


def predicts(optimizer: Any) -> bool:
    """Whether there are phases to measure."""
    return isinstance(optimizer, HybridOptimizer) and optimizer.hybrid.predictor != "none"


def measure(context: Context, work: Workload, dtype: str, optimizers: dict[str, Any]) -> None:
    """Lets every optimizer take one step of each of its phases in turn, round after round."""
    clock, samples = Clock(context), dict[tuple[str, str], list[tuple[float, float]]]()
    rounds = 0
    for number, name in turns(list(optimizers), ROUNDS, context):
        optimizer, phase = optimizers[name], ""
        rounds = number + 1
        for _ in range(MOST_STEPS if predicts(optimizer) else 1):
            if phase == Phase.CORRECT.value:
                break
            phase = getattr(getattr(optimizer, "phase", None), "value", "step")
            earlier = samples.setdefault((name, phase), [])
            ahead = 0.0 if name == WAITS or not earlier else 2e-3 * earlier[-1][1]
            work.refill()
            earlier.append(clock.measure(optimizer.step, ahead))
    counted = {key: found[-rounds:] for key, found in samples.items() if len(found) >= rounds}
    reference = [sample[0] for sample in counted[REFERENCE, "step"]]
    for (name, phase), found in counted.items():
        device, host = zip(*found)
        times = {"device_ms": spread(device), "host_ms": spread(host)}
        ratio = {f"of_{REFERENCE}": ratios(device, reference)}
        context.row(dtype=dtype, optimizer=name, phase=phase, **times, **ratio)
    if CHAIN in optimizers:
        chain, ours = (
            [sample[0] for sample in counted[key]] for key in ((CHAIN, "step"), (SCALED, "full"))
        )
        share = ratios(ours, chain)["median"]
        held = share <= LIMIT_OF_CHAIN or not context.on_gpu
        context.check(f"{dtype}: {SCALED}, of {CHAIN}", held, share, LIMIT_OF_CHAIN)
    for name, optimizer in optimizers.items():
        if predicts(optimizer):
            stats = optimizer.stats()
            detail = f"{stats.predicted_steps} predicted, taken back: {stats.divergences}"
            held = stats.predicted_steps > 0 and stats.rollbacks == 0
            context.check(f"{dtype}, {name}: predictions were made and held", held, detail=detail)


BATCHES = ((4, 64, False), (16, 1024, True))  # sequences, tokens, forward pass in BF16?
MUON = "hybrid muon alone"
LIMIT_OF_MUON = 0.05  # what our step for the matrices may take of both passes, largest batch
TINY = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}

Build = Callable[[nn.Module], list[torch.optim.Optimizer]]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizer to compare with."""
    return [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]


def hybrid(model: nn.Module, **changes: Any) -> list[torch.optim.Optimizer]:
    """Ours, with the default configuration but for some changes."""
    return [HybridOptimizer(model.parameters(), lr=1e-4, hybrid=HybridConfig(**changes))]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Ours without predictions, one for the hidden matrices and one for all else."""
    still, groups = HybridConfig(predictor="none"), split_param_groups(model, lr=1e-4)
    return [HybridOptimizer([group], hybrid=still) for group in groups]


def gpt2(context: Context) -> None:
    """Trains with AdamW, with `HybridOptimizer`, and with Muon, in turn."""
    builds: dict[str, Build] = {REFERENCE: adamw, "hybrid": hybrid, MUON: muon_and_adamw}
    for sequences, tokens, mixed in BATCHES:
        batch = f"{sequences}x{tokens} {'bf16 autocast' if mixed else 'fp32'}"
        if context.has_room(f"GPT-2 small, {batch}", room(len(builds), sequences, tokens)):
            made = {n: Training(context, sequences, tokens, mixed, b) for n, b in builds.items()}
            tell(context, batch, in_turn(context, made, ROUNDS))
            del made


def room(models: int, sequences: int, tokens: int) -> int:
    """Bytes of models with state, and of what both passes keep: logits several times over."""
    return 40 * models * PARAMETERS + 8 * 4 * sequences * tokens * VOCABULARY


@functools.cache
def template(tiny: bool) -> Any:
    """GPT-2 small with random weights, fused attention and no dropout; made once, on the CPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**still, use_cache=False, **(TINY if tiny else {}))
    # A private name, but the one that every version since 4.36 reads; from_config sets it too.
    config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers warns when it has to guess
    return model.train()


class Training:
    """A model, random tokens to train it on, and its optimizers."""

    def __init__(
        self, context: Context, sequences: int, tokens: int, mixed: bool, build: Build
    ) -> None:
        self._context, self._mixed, self._number = context, mixed, 0
        self.model = copy.deepcopy(template(not context.on_gpu)).to(context.device)
        self.optimizers = build(self.model)
        shape = (4, sequences, tokens) if context.on_gpu else (4, 2, TINY["n_positions"])
        torch.manual_seed(context.seed)
        vocabulary = self.model.config.vocab_size
        self._batches = torch.randint(vocabulary, shape, device=context.device)

    def step(self) -> list[float]:
        """One training step: milliseconds of both passes, and of each optimizer's step."""
        clock: Callable[[], Any] = mark if self._context.on_gpu else lambda: None
        marks = [clock()]
        ids = self._batches[self._number % len(self._batches)]
        self._number += 1
        with torch.autocast(self._context.device.type, torch.bfloat16, enabled=self._mixed):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        marks.append(clock())
        for optimizer in self.optimizers:
            if isinstance(optimizer, HybridOptimizer):
                optimizer.observe_loss(loss.detach())
            optimizer.step()
            marks.append(clock())
        self.model.zero_grad(set_to_none=True)
        self._context.synchronise()
        return [a.elapsed_time(b) if a else 1.0 for a, b in itertools.pairwise(marks)]


def in_turn(
    context: Context, trainings: dict[str, Training], rounds: int
) -> dict[str, list[list[float]]]:
    """Lets every model take a training step in turn; returns what `step` does, round by round."""
    times: dict[str, list[list[float]]] = {name: [] for name in trainings}
    for number, name in turns(list(trainings), rounds, context):
        taken = trainings[name].step()
        times[name] += [taken] * (number >= 0)
    return times


def tell(context: Context, batch: str, times: dict[str, list[list[float]]]) -> None:
    """Summarises the rounds."""
    wholes = {name: [sum(each) for each in rounds] for name, rounds in times.items()}
    for name, rounds in times.items():
        passes, steps = [each[0] for each in rounds], [sum(each[1:]) for each in rounds]
        parts = {"passes_ms": spread(passes), "step_ms": spread(steps)}
        ratio = {f"of_{REFERENCE}": ratios(wholes[name], wholes[REFERENCE])}
        ratio |= {"step_of_passes": ratios(steps, passes)["median"]}
        parts["whole_ms"] = spread(wholes[name])
        context.row(batch=batch, optimizer=name, **parts, **ratio)
    share = ratios([each[1] for each in times[MUON]], [each[0] for each in times[MUON]])["median"]
    largest = batch.startswith("{}x{} ".format(*BATCHES[-1]))
    held = share < LIMIT_OF_MUON or not largest or not context.on_gpu
    context.check(f"{batch}: Muon's matrices of both passes", held, share, LIMIT_OF_MUON)
