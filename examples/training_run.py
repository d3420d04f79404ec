"""One training run of GPT-2, timed step by step: the same loop for both optimizers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from gpt2_options import GPT2_VOCABULARY, MODEL_SHAPES, Options
from host_memory import release_memory
from peak_memory import PeakMemory
from run_records import ALONE, BASELINE, BASES, HYBRID, MUON, RunRecord, StepRecord
from text_data import TokenizedText, WindowSampler, held_out_windows
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from triton_hybrid import HybridOptimizer, split_param_groups

HELD_OUT_BATCH = 16
REHEARSAL_LIMIT = 200
HYBRIDS = (HYBRID, ALONE)  # runs of HybridOptimizer, with predictions or without
WARM_UP_SEED_OFFSET = 1 << 62  # the warm-up batch is none of the run's own
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def use_device(options: Options) -> None:
    """Lets this process train with the flags' threads, on their device."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)


def model_config(options: Options, text: TokenizedText) -> GPT2Config:
    """Returns the configuration of the model.

    Args:
        options: Which size, and the dropout.
        text: Whose vocabulary it has.
    """
    shape = MODEL_SHAPES[options.model]
    return GPT2Config(
        vocab_size=text.vocabulary,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_positions=shape.context,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        bos_token_id=text.end_of_text,
        eos_token_id=text.end_of_text,
        use_cache=False,
    )


def parameter_count(options: Options, text: TokenizedText) -> int:
    """Counts the model's parameters, those that are tied once.

    Args:
        options: Which size.
        text: Whose vocabulary it has.

    Raises:
        RuntimeError: It is not the size that GPT-2 has.
    """
    with torch.device("meta"):
        model = GPT2LMHeadModel(model_config(options, text))
    count = sum(int(parameter.numel()) for parameter in model.parameters())
    expected = MODEL_SHAPES[options.model].parameters
    if text.vocabulary == GPT2_VOCABULARY and expected not in (None, count):
        raise RuntimeError(f"GPT-2 {options.model} has {count:,} parameters, not {expected:,}")
    return count


def parameter_groups(name: str, model: torch.nn.Module, options: Options) -> list[dict[str, Any]]:
    """Returns the model's parameters in the groups that a run's optimizer takes.

    Args:
        name: Which run.
        model: The model.
        options: Its base rule and learning rates.
    """
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
    loss_scale: float | str | None = None,
) -> tuple[torch.optim.Optimizer, str]:
    """Builds the optimizer of a run.

    Args:
        name: "hybrid", "base_alone" (which never predicts), or anything else for AdamW.
        groups: What it trains.
        options: Its settings.
        loss_scale: Loss scaling of HybridOptimizer; AdamW has none.

    Returns:
        The optimizer, and which one it is.
    """
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "weight_decay": options.weight_decay,
    }
    if name in HYBRIDS:
        config, drive = options.hybrid, options.drive
        if name == ALONE:
            config, drive = dataclasses.replace(config, predictor="none"), "no prediction"
        optimizer = HybridOptimizer(groups, hybrid=config, loss_scale=loss_scale, **settings)
        rule = f", {BASES[MUON]} for hidden matrices" if options.base == MUON else ""
        return optimizer, f"HybridOptimizer, {drive}{rule}"
    implementation = options.baseline_implementation
    switches: dict[str, bool] = {}
    if implementation != "default":
        switches = {name: implementation == name for name in ("fused", "foreach")}
    adamw = torch.optim.AdamW(groups, **settings, **switches)
    return adamw, f"torch.optim.AdamW, {implementation}"


def train(
    record: RunRecord,
    options: Options,
    text: TokenizedText,
    *,
    evaluate_after: Collection[int] = (),
    report: Callable[[RunRecord], None] = lambda record: None,
    micro_batches: int = 1,
    loss_scale: float | str | None = None,
) -> None:
    """Trains once and fills in the record as it goes, so that an interruption loses nothing.

    Only the steps themselves are timed. Before them each run evaluates its held-out loss and
    takes one forward and backward on a batch of its own, whose gradient is thrown away.

    Args:
        record: Says which run and how long, and takes what it does.
        options: Everything else about the run.
        text: What to train on.
        evaluate_after: Numbers of gradient evaluations after which to measure held-out loss.
        report: Called after every step.
        micro_batches: Parts that each batch is divided into; their gradients are accumulated.
        loss_scale: Loss scaling of HybridOptimizer; AdamW has none.
    """
    device = options.device
    memory = PeakMemory(device)
    record.memory_before = memory.used()
    torch.manual_seed(record.seed)
    # Random weights, made on the CPU and in FP32 so that every device starts from the same.
    model = GPT2LMHeadModel(model_config(options, text))
    model.loss_type = "ForCausalLM"  # transformers warns when it has to guess
    # AdamW has no master weights: it gets FP32 weights and casts in the forward pass instead.
    half = PRECISIONS.get(options.precision)
    model.to(device=device, dtype=half if record.name in HYBRIDS else None)
    autocast_dtype = None if record.name in HYBRIDS else half
    batches = WindowSampler(text.training, options.batch, options.length, record.seed, device)
    windows = held_out_windows(text.held_out, options.held_out_windows, options.length)

    def held_out_loss() -> float:
        with _autocast(device, autocast_dtype):
            return evaluate(model, windows.to(device))

    record.held_out_start = held_out_loss()

    forward = torch.compile(model) if options.compile else model
    groups = parameter_groups(record.name, model, options)
    optimizer, record.optimizer = build_optimizer(record.name, groups, options, loss_scale)
    scheduler = LambdaLR(optimizer, _schedule(options.schedule, record.planned_steps))
    hybrid = optimizer if isinstance(optimizer, HybridOptimizer) else None

    warm_up = WindowSampler(
        text.training, options.batch, options.length, record.seed ^ WARM_UP_SEED_OFFSET, device
    )
    scale = hybrid.scale_loss if hybrid is not None and loss_scale is not None else None

    def compute_gradient(inputs: torch.Tensor) -> torch.Tensor:
        total = None
        for part in inputs.chunk(micro_batches):
            with _autocast(device, autocast_dtype):
                loss = _loss(forward, part)
            if micro_batches > 1:
                loss = loss / micro_batches
            (loss if scale is None else scale(loss)).backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    compute_gradient(warm_up.draw())
    optimizer.zero_grad()
    if device.type == "cuda":
        rehearse(record.name, model, options)
        release_memory()
    torch.manual_seed(record.seed)  # dropout, if any, starts alike in every run

    gradients = 0
    with memory.sampler():
        try:
            for index in range(record.planned_steps):
                phase = BASELINE if hybrid is None else hybrid.phase.name.lower()
                step_loss = None
                with memory.watch():
                    _synchronize(device)
                    started, processor_started = time.perf_counter(), time.process_time()
                    # Looked at once for the whole window of micro-batches: a Predict step has
                    # no forward and no backward in any of them.
                    if hybrid is None or hybrid.needs_backward:
                        step_loss = compute_gradient(batches.draw())
                        if hybrid is not None:
                            hybrid.observe_loss(step_loss)
                        gradients += 1
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    _synchronize(device)
                    seconds = time.perf_counter() - started
                    record.processor_seconds.append(time.process_time() - processor_started)
                record.steps.append(
                    StepRecord(
                        step=index + 1,
                        phase=phase,
                        seconds=seconds,
                        gradients=gradients,
                        loss=None if step_loss is None else float(step_loss),
                    )
                )
                report(record)
                if gradients in evaluate_after and step_loss is not None:
                    record.held_out_after[gradients] = held_out_loss()
        finally:
            record.memory_peak = memory.peak
            record.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            if hybrid is not None:
                record.stats = hybrid.stats().to_dict()
                record.state_bytes_device = record.stats["state_bytes_device"]
                record.state_bytes_host = record.stats["state_bytes_host"]
            else:
                record.state_bytes_device = _state_bytes(optimizer)
    record.held_out_end = record.held_out_after.get(gradients)
    if record.held_out_end is None:
        record.held_out_end = held_out_loss()


def rehearse(name: str, model: torch.nn.Module, options: Options) -> None:
    """Takes steps on copies of the parameters, so that no timed step compiles a kernel.

    Args:
        name: Which optimizer.
        model: Whose parameters are copied.
        options: The optimizer's settings.
    """
    groups = parameter_groups(name, model, options)
    for group in groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        for copy in group["params"]:
            copy.grad = torch.full_like(copy, 1e-3)  # the same every time, so it can be predicted
    optimizer, _ = build_optimizer(name, groups, options)
    steps = 2
    if isinstance(optimizer, HybridOptimizer):
        config = optimizer.hybrid
        cycle = config.max_predict_steps + config.correction_interval
        steps = min(REHEARSAL_LIMIT, config.warmup_steps + config.full_steps + cycle)
    for _ in range(steps):
        optimizer.step()
    _synchronize(options.device)


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, windows: torch.Tensor) -> float:
    """Returns the mean loss over some windows, with dropout off.

    Args:
        model: The model.
        windows: Token ids of shape (windows, length).
    """
    was_training = model.training
    model.eval()
    parts = torch.split(windows, HELD_OUT_BATCH)
    total = sum(_loss(model, part).item() * len(part) for part in parts)
    model.train(was_training)
    return total / len(windows)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _loss(forward: Callable[..., Any], inputs: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = forward(input_ids=inputs, labels=inputs).loss
    return loss


def _autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _schedule(name: str, steps: int) -> Callable[[int], float]:
    if name == "linear":
        return lambda step: max(0.0, 1 - step / steps)
    return lambda step: 1.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
