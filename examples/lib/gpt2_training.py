"""One training run of GPT-2 on text, timed step by step: the same loop for all optimizers."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from lib.environment import environment
from lib.flags import fail
from lib.gpt2_options import GPT2_VOCABULARY, MODEL_SHAPES, PARAMETERS, Options
from lib.gpt2_records import ALONE, BASELINE, BASES, HYBRIDS, MUON, RunRecord, StepRecord
from lib.memory import PeakMemory, keep_freed_memory, release_memory
from lib.processes import ALONE as THIS_PROCESS
from lib.processes import Processes
from lib.text_data import TokenizedText, WindowSampler, held_out_windows, load_corpus, tokenize
from triton_hybrid import HybridOptimizer, split_param_groups

HELD_OUT_BATCH = 16
REHEARSAL_LIMIT = 200
WARM_UP_SEED_OFFSET = 1 << 62  # the warm-up batch is none of the run's own
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
LossScale = float | str | None


def prepare(example: str, options: Options) -> tuple[TokenizedText, dict[str, Any]]:
    """Makes the process, the text and the folder for results ready.

    Too little text, or something else than text, ends the program.

    Returns:
        The text, and what JSON files say about surroundings, model and text.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device.type == "cuda" and options.device.index is not None:
        torch.cuda.set_device(options.device)
    kept = keep_freed_memory(options.device)
    assert options.vocabulary is not None
    try:
        corpus = load_corpus(options.data)
        text = tokenize(corpus, options.vocabulary, options.tokenizer)
        text.check_length(options.length)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        fail(error)
    content = {"example": example, **environment(options.device)}
    content["hardware"]["freed_memory_kept"] = kept  # times with and without are not comparable
    content["parameters"] = parameter_count(options, text)
    content["data"] = {
        "description": corpus.description,
        "split": corpus.split,
        "sha256": corpus.digest(),
        "tokenizer": text.description,
        "vocabulary": text.vocabulary,
        "training_files": len(corpus.training),
        "training_tokens": len(text.training),
        "held_out_files": len(corpus.held_out),
        "held_out_tokens": len(text.held_out),
    }
    return text, content


def model_config(options: Options, text: TokenizedText) -> GPT2Config:
    """Returns the configuration of the model, with the vocabulary of the text."""
    shape = zip(("n_layer", "n_embd", "n_head", "n_positions"), MODEL_SHAPES[options.model])
    return GPT2Config(
        vocab_size=text.vocabulary,
        **dict(shape),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options.dropout),
        bos_token_id=text.end_of_text,
        eos_token_id=text.end_of_text,
        use_cache=False,
    )


def parameter_count(options: Options, text: TokenizedText) -> int:
    """Counts the parameters, those that are tied once; a RuntimeError if GPT-2 has others."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(model_config(options, text))
    count = sum(int(parameter.numel()) for parameter in model.parameters())
    expected = PARAMETERS.get(options.model, count)
    if text.vocabulary == GPT2_VOCABULARY and expected != count:
        raise RuntimeError(f"GPT-2 {options.model} has {count:,} parameters, not {expected:,}")
    return count


def parameter_groups(name: str, model: torch.nn.Module, options: Options) -> list[dict[str, Any]]:
    """Returns the model's parameters in the groups that the optimizer of a run takes."""
    if name in HYBRIDS and options.base == MUON:
        return split_param_groups(
            model,
            lr=options.learning_rate,
            muon_lr=options.muon_learning_rate,
            weight_decay=options.weight_decay,
        )
    return [{"params": list(model.parameters())}]


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    options: Options,
    loss_scale: LossScale = None,
    several: bool = False,
) -> tuple[torch.optim.Optimizer, str]:
    """Builds the optimizer of a run, and says which one it is.

    Args:
        name: Which run: one of `HYBRIDS` ("base_alone" never predicts), or another for AdamW.
        groups: What it trains.
        options: Its settings.
        loss_scale: Loss scaling of HybridOptimizer; AdamW has none.
        several: Whether several processes decide together.
    """
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if name in HYBRIDS:
        still = dataclasses.replace(options.hybrid, predictor="none")
        config = still if name == ALONE else options.hybrid
        drive = "no prediction" if name == ALONE else options.drive
        settings |= {"loss_scale": loss_scale, "accumulation": options.windows()}
        settings["process_group"] = None if several else False
        optimizer = HybridOptimizer(groups, hybrid=config, **settings)
        rule = f", {BASES[MUON]} for hidden matrices" if options.base == MUON else ""
        return optimizer, f"HybridOptimizer, {drive}{rule}"
    implementation = options.baseline_implementation
    if implementation != "default":
        settings |= {switch: switch == implementation for switch in ("fused", "foreach")}
    return torch.optim.AdamW(groups, **settings), f"torch.optim.AdamW, {implementation}"


class Trainee:
    """Model, optimizer and batches of one run, before its first step; the arguments are `train`'s.

    The held-out loss at the start is measured, and one gradient is computed on a batch that is
    none of the run's own, and thrown away: no timed step does anything for the first time.
    """

    def __init__(
        self,
        record: RunRecord,
        options: Options,
        text: TokenizedText,
        micro_batches: int,
        loss_scale: LossScale,
        processes: Processes,
    ) -> None:
        self.device, self.micro_batches = options.device, micro_batches
        self.processes = processes
        self.accumulation, self.record = options.accumulation, record
        torch.manual_seed(record.seed)
        # Random weights, made on the CPU and in FP32 so that every device starts from the same.
        self.model = GPT2LMHeadModel(model_config(options, text))
        self.model.loss_type = "ForCausalLM"  # transformers warns when it has to guess
        # AdamW has no master weights: it gets FP32 weights and casts in the forward pass instead.
        half = PRECISIONS.get(options.precision)
        is_hybrid = record.name in HYBRIDS
        casts = half is not None and not is_hybrid
        self.autocast = torch.autocast(self.device.type, dtype=half, enabled=casts)
        self.model.to(device=self.device, dtype=half if is_hybrid else None)
        size = options.batch, options.length
        self.batches = WindowSampler(text.training, *size, record.seed, self.device)
        self.windows = held_out_windows(text.held_out, options.held_out_windows, options.length)
        record.held_out_start = self.held_out_loss()

        self.forward: Any = self.model
        if processes.several:
            self.forward = DistributedDataParallel(self.model)
        if options.compile == "yes":
            self.forward = torch.compile(self.forward)
        groups = parameter_groups(record.name, self.model, options)
        self.optimizer, record.optimizer = build_optimizer(
            record.name, groups, options, loss_scale, processes.several
        )
        linear = options.schedule == "linear"
        self.scheduler = LambdaLR(
            self.optimizer,
            lambda step: max(0.0, 1 - step / record.planned_steps) if linear else 1.0,
        )
        self.hybrid = self.optimizer if isinstance(self.optimizer, HybridOptimizer) else None
        scaled = self.hybrid is not None and loss_scale is not None
        self.scale_loss = self.hybrid.scale_loss if self.hybrid and scaled else lambda loss: loss

        other_seed = record.seed ^ WARM_UP_SEED_OFFSET
        self.compute_gradient(WindowSampler(text.training, *size, other_seed, self.device).draw())
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            rehearse(record.name, self.model, options)
            release_memory()
        torch.manual_seed(record.seed)  # dropout, if any, starts alike in every run

    @property
    def phase(self) -> str:
        """The optimizer's phase in the next step; "baseline" where it has none."""
        return BASELINE if self.hybrid is None else self.hybrid.phase.name.lower()

    def held_out_loss(self) -> float:
        """Returns the mean loss over the held-out windows."""
        with self.autocast:
            return evaluate(self.model, self.windows.to(self.device))

    def compute_gradient(self, inputs: torch.Tensor) -> torch.Tensor:
        """Accumulates the gradient of a batch; returns its loss, which is not synchronised.

        Of several processes each takes its part, and has the loss of that.
        """
        losses = []
        for part in self.processes.part(inputs).chunk(self.micro_batches):
            with self.autocast:
                loss: torch.Tensor = self.forward(input_ids=part, labels=part).loss
            if self.micro_batches > 1:
                loss = loss / self.micro_batches
            # With windows HybridOptimizer divides by the batches that it got, AdamW does not.
            share = loss if self.hybrid or self.accumulation == 1 else loss / self.accumulation
            self.scale_loss(share).backward()
            losses.append(loss.detach())
        return functools.reduce(torch.add, losses)

    def compute_window(self) -> torch.Tensor:
        """Accumulates the gradients of the batches of a step; returns their mean loss."""
        losses: list[torch.Tensor] = []
        while len(losses) < self.accumulation:
            losses.append(self.compute_gradient(self.batches.draw()))
            if self.hybrid is not None:
                self.hybrid.observe_loss(losses[-1])
                if self.hybrid.window_complete:
                    break
        self.record.windows.append(len(losses))
        return functools.reduce(torch.add, losses) / len(losses)

    def step(self) -> torch.Tensor | None:
        """Takes a step; returns the loss of its batch, or None of a step without gradient."""
        loss = None
        # Looked at once for the whole window of micro-batches: a Predict step has no forward and
        # no backward in any of them.
        if self.hybrid is None or self.hybrid.needs_backward:
            loss = self.compute_window()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss

    def describe(self, record: RunRecord) -> None:
        """Fills in what the optimizer keeps and reports."""
        record.parameter_bytes = _bytes(list(self.model.parameters()))
        if self.hybrid is not None:
            record.stats = self.hybrid.stats().to_dict()
            record.state_bytes_device = record.stats["state_bytes_device"]
            record.state_bytes_host = record.stats["state_bytes_host"]
        else:
            states = self.optimizer.state.values()
            record.state_bytes_device = _bytes([x for one in states for x in one.values()])


def train(
    record: RunRecord,
    options: Options,
    text: TokenizedText,
    *,
    evaluate_after: Collection[int] = (),
    report: Callable[[RunRecord], None] = lambda record: None,
    micro_batches: int = 1,
    loss_scale: LossScale = None,
    processes: Processes = THIS_PROCESS,
) -> None:
    """Trains once and fills in the record as it goes, so that an interruption loses nothing.

    Only the steps themselves are timed.

    Args:
        record: Says which run and how long, and takes what it does.
        options: Everything else about the run.
        text: What to train on.
        evaluate_after: Numbers of gradient evaluations after which to measure held-out loss.
        report: Called after every step.
        micro_batches: Parts that each batch is divided into; their gradients are accumulated.
        loss_scale: Loss scaling of HybridOptimizer; AdamW has none.
        processes: Which share each batch, under DistributedDataParallel.
    """
    release_memory()  # so that every run starts with what the last one left
    device, memory = options.device, PeakMemory(options.device)
    record.device, record.memory_before = device.type, memory.used()
    record.processes = processes.count
    trainee = Trainee(record, options, text, micro_batches, loss_scale, processes)
    gradients = 0
    with memory.sampler():
        try:
            for _ in range(record.planned_steps):
                phase = trainee.phase
                with memory.watch():
                    _synchronize(device)
                    started, processor_started = time.perf_counter(), time.process_time()
                    loss = trainee.step()
                    _synchronize(device)
                    times = time.perf_counter() - started, time.process_time() - processor_started
                gradients += loss is not None
                known = None if loss is None else processes.mean(loss)
                record.steps.append(StepRecord(phase, *times, memory.last, gradients, known))
                if options.adaptive and trainee.hybrid is not None:
                    record.noise_scales.append(trainee.hybrid.stats().noise_scale)
                report(record)
                if gradients in evaluate_after and loss is not None:
                    record.held_out_after[gradients] = trainee.held_out_loss()
        finally:
            record.memory_peak = memory.peak
            trainee.describe(record)
    record.held_out_end = record.held_out_after.get(gradients)
    if record.held_out_end is None:
        record.held_out_end = trainee.held_out_loss()


def rehearse(name: str, model: torch.nn.Module, options: Options) -> None:
    """Takes steps on copies of a run's parameters, so that no timed step compiles a kernel."""
    groups = parameter_groups(name, model, options)
    for group in groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        for copy in group["params"]:
            copy.grad = torch.full_like(copy, 1e-3)  # the same every time, so it can be predicted
    optimizer, _ = build_optimizer(name, groups, options)
    config = options.hybrid
    cycle = config.full_steps + config.max_predict_steps + config.correction_interval
    steps = min(REHEARSAL_LIMIT, config.warmup_steps + cycle) if name in HYBRIDS else 2
    for _ in range(steps):
        optimizer.step(lambda: 0.0)  # what a closure has computed is a window of one batch
    _synchronize(options.device)


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, windows: torch.Tensor) -> float:
    """Returns the mean loss over windows of token ids, (windows, length), with dropout off."""
    was_training = model.training
    model.eval()
    parts = torch.split(windows, HELD_OUT_BATCH)
    total: float = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts)
    model.train(was_training)
    return total / len(windows)


def _bytes(values: list[Any]) -> int:
    """Counts the bytes of the tensors among some values."""
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def follow(
    show: Callable[[int, str], None], title: str, before: int = 0
) -> Callable[[RunRecord], None]:
    """Returns what shows the progress of a run after every step, `before` of earlier runs."""

    def report(run: RunRecord) -> None:
        loss = next((x.loss for x in reversed(run.steps) if x.loss is not None), math.nan)
        show(before + len(run.steps), f"{title}, {run.steps[-1].phase}, loss {loss:.3f}")

    return report
