"""Section 8: Muon beside ``torch.optim.Muon`` and a compiled batch, and its part of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from suite_context import ANY, Context, release_memory
from suite_gpt2 import Training
from suite_gpt2_shapes import GPT2_SIZES, Matrix
from suite_muon_contenders import (
    COMPILED,
    DECAY,
    EPS,
    LR,
    MOMENTUM,
    OURS,
    TORCH_BLOCKS,
    TORCH_WHOLE,
    Contenders,
    blocks_of_matrix,
    fp32_sums,
    hybrid_muon,
    joined,
    torch_muon,
)
from suite_problems import Launches, relative_error
from suite_records import UNKNOWN, Check, Row, SectionResult, Skip, Timing
from suite_steps import Step, device_time
from suite_timing import new_event
from torch import Tensor, nn
from triton_hybrid.base.muon import MUON_DEFAULTS, rate_scale, schedule
from triton_hybrid.kernels.newton_schulz import newton_schulz_reference

from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

KERNEL = "newton_schulz"
FP32_TOLERANCE = 1e-5
"""Of the update in FP32, beside plain torch's."""
BF16_TOLERANCE = 1e-2
"""Of the update in BF16, beside ``torch.optim.Muon``'s. Both round alike, but not every sum is
added up in one order, and a bit that falls the other way grows from step to step."""
LITTLE_WORSE = 1.25
"""The update in BF16 may be off the one in FP32 by so many times what ``torch.optim.Muon``'s is
(1 to 2%): that one falls with luck, too."""
LIMIT_OF_TORCH = 0.5
"""What our step may take, as a part of ``torch.optim.Muon``'s for the same blocks."""
LIMIT_OF_TRAINING = 0.05
"""What our step may take, as a part of a forward and backward pass of GPT-2 small."""
SHAPES = (
    Matrix((64, 96)), Matrix((1, 48)), Matrix((48, 1)), Matrix((127, 129)), Matrix((257, 33)),
    Matrix((768, 2304), (1, 3)), Matrix((768, 3072)), Matrix((3072, 768)), Matrix((1000, 1601)),
)  # fmt: skip
TINY_SHAPES = (
    Matrix((16, 24)), Matrix((1, 20)), Matrix((20, 1)), Matrix((31, 17)), Matrix((16, 48), (1, 3)),
)  # fmt: skip
"""For the interpreter."""
ROUNDS, DROPPED = 10, 2
BYTES_OF_A_PARAMETER = 42
"""FP32 weights, gradients and momenta three times over, and what lives during a step."""
TRAINING_BATCH = (16, 1024)
Measure = Callable[[Step], tuple[float, float]]


@dataclass
class MuonRow(Row):
    """One optimizer's step for the hidden matrices of a model.

    Attributes:
        model: Whose matrices.
        optimizer: Which.
        device: Milliseconds that the device works, the host being ahead of it.
        alone: Milliseconds from the call to the end of its work, from an idle device.
        ratio: Our milliseconds to these in the same round, on the device; None for ours.
        ratio_alone: The same from an idle device.
        launches: Of Triton kernels; None where they are torch's.
    """

    HEAD: ClassVar[tuple[str, ...]] = (
        "model", "optimizer", "device ms (p20-p80)", "alone ms (p20-p80)", "ours / this",
        "alone", "Triton launches",
    )  # fmt: skip
    model: str
    optimizer: str
    device: Timing
    alone: Timing
    ratio: Timing | None
    ratio_alone: Timing | None
    launches: int | None

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        alone = f"{self.ratio_alone.median:.2f}" if self.ratio_alone else UNKNOWN
        return (
            self.model, self.optimizer, str(self.device), str(self.alone),
            str(self.ratio or UNKNOWN), alone, str(self.launches or UNKNOWN),
        )  # fmt: skip


@dataclass
class ShareRow(Row):
    """Our step beside the forward and backward pass that its gradients came from."""

    HEAD: ClassVar[tuple[str, ...]] = (
        "GPT-2 small", "forward+backward ms", "Muon ms", "AdamW ms", "Muon's share", "both",
    )  # fmt: skip
    batch: str
    passes: Timing
    matrices: Timing
    rest: Timing
    share: Timing
    share_with_rest: Timing

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        times = (str(self.passes), str(self.matrices), str(self.rest))
        shares = (f"{100 * t.median:.2f}%" for t in (self.share, self.share_with_rest))
        return (self.batch, *times, *shares)


@dataclass
class Samples:
    """Milliseconds of one optimizer, round by round."""

    device: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


def muon(context: Context, result: SectionResult) -> None:
    """Checks the update; then times the step beside the others', and beside the training."""
    result.facts["limits"] = {
        "ours / torch.optim.Muon, same blocks": LIMIT_OF_TORCH,
        "ours / forward and backward pass of GPT-2 small": LIMIT_OF_TRAINING,
    }
    check_updates(context, result)
    for size in GPT2_SIZES:
        context.check_time()
        name = f"GPT-2 {size.name}"
        if context.refuses(result, name, [KERNEL], "fp32"):
            continue
        matrices = size.matrices()
        elements = sum(math.prod(matrix.shape) for matrix in matrices)
        if not context.has_room(result, name, BYTES_OF_A_PARAMETER * elements):
            continue
        try:
            compare(context, result, name, matrices)
        except torch.cuda.OutOfMemoryError as error:
            result.skipped.append(Skip(name, f"out of device memory: {str(error)[:80]}"))
        finally:
            release_memory()
        if size is GPT2_SIZES[0]:
            context.check_time()
            beside_training(context, result)


# ------------------------------------------------------------------------------ correctness


def check_updates(context: Context, result: SectionResult) -> None:
    """One step of all shapes together, beside ``torch.optim.Muon`` and FP32 in plain torch."""
    generator = torch.Generator(context.device).manual_seed(context.seed)

    def normal(matrix: Matrix) -> Tensor:
        return torch.randn(matrix.shape, generator=generator, device=context.device)

    shapes = TINY_SHAPES if context.tiny else SHAPES
    weights = [0.02 * normal(matrix) for matrix in shapes]
    gradients = [1e-3 * normal(matrix) for matrix in shapes]
    exact = [exact_update(*each) for each in zip(shapes, weights, gradients)]
    ours = {
        dtype: our_updates(shapes, weights, gradients, dtype) for dtype in ("bfloat16", "float32")
    }
    theirs: list[Tensor] | None = None
    if torch_muon() is None:
        what = "the update beside torch.optim.Muon"
        result.skipped.append(Skip(what, f"torch {torch.__version__} has no torch.optim.Muon"))
    else:
        with fp32_sums():
            theirs = [torch_update(*each) for each in zip(shapes, weights, gradients)]
    apart = result.facts.setdefault("updates in BF16", {})
    for index, matrix in enumerate(shapes):
        rows, columns = matrix.shape
        name = f"{rows}x{columns}" + ("" if matrix.grid == (1, 1) else f" in blocks {matrix.grid}")
        here = [exact[index]]
        note(
            context, result, f"{name}: FP32 products beside plain torch",
            relative_error([ours["float32"][index]], here), FP32_TOLERANCE,
        )  # fmt: skip
        if theirs is None:
            continue
        mine, other = [ours["bfloat16"][index]], [theirs[index]]
        off, usual = relative_error(mine, here), relative_error(other, here)
        between = relative_error(mine, other)
        note(
            context, result, f"{name}: BF16, off FP32 no more than torch.optim.Muon",
            off, LITTLE_WORSE * usual,
        )  # fmt: skip
        # Says nothing about the kernels that the check before does not: they may be timed.
        beside = f"{name}: BF16 beside torch.optim.Muon"
        passed = between < BF16_TOLERANCE
        context.note(result, Check(beside, "", "fp32", passed, between, BF16_TOLERANCE))
        apart[name] = {
            "ours to torch.optim.Muon": between,
            "ours to FP32": off,
            "torch.optim.Muon to FP32": usual,
        }


def note(
    context: Context, result: SectionResult, name: str, error: float, tolerance: float
) -> None:
    """Keeps a check of an error."""
    context.note(result, Check(name, KERNEL, "fp32", error <= tolerance, error, tolerance))


def moved(weight: Tensor, param: Tensor) -> Tensor:
    """What a step has taken from a weight besides its decay, in FP64."""
    return (1 - LR * DECAY) * weight.double() - param.detach().double()


def our_updates(
    matrices: Sequence[Matrix], weights: Sequence[Tensor], gradients: Sequence[Tensor], dtype: str
) -> list[Tensor]:
    """The updates of one step of ours, all matrices in one group."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    hybrid_muon(params, matrices, ns_dtype=dtype).step()
    return [moved(weight, param) for weight, param in zip(weights, params)]


def torch_update(matrix: Matrix, weight: Tensor, gradient: Tensor) -> Tensor:
    """The update of one step of ``torch.optim.Muon``, each block a parameter."""
    build = torch_muon()
    assert build is not None
    params = [nn.Parameter(block.clone()) for block in blocks_of_matrix(matrix, weight)]
    for param, block in zip(params, blocks_of_matrix(matrix, gradient)):
        param.grad = block.clone()
    build(params).step()
    return moved(weight, joined(matrix, [param.detach() for param in params]))


def exact_update(matrix: Matrix, weight: Tensor, gradient: Tensor) -> Tensor:
    """The update of one step in plain torch and FP32."""
    momentum = (1 - MOMENTUM) * gradient
    ahead = gradient.lerp(momentum, MOMENTUM)
    steps = schedule(MUON_DEFAULTS)
    done = [newton_schulz_reference(b, steps, EPS) for b in blocks_of_matrix(matrix, ahead)]
    return LR * rate_scale("match_rms_adamw", *matrix.block) * joined(matrix, done).double()


# ------------------------------------------------------------------------------------ speed


def compare(context: Context, result: SectionResult, name: str, matrices: Sequence[Matrix]) -> None:
    """Times every contender's step in turn, and judges the ratio."""
    contenders = Contenders(matrices, context.device, context.seed)
    launches = Launches()
    with launches.counted():
        contenders.steps[OURS]()
    samples = alternating(context, contenders.steps, ROUNDS, both_times)
    add_rows(context, result, name, samples, len(launches.names))
    for other in (TORCH_BLOCKS, TORCH_WHOLE, COMPILED):
        if other not in samples:
            result.skipped.append(Skip(f"{other}, {name}", contenders.missing[other]))


def both_times(step: Step) -> tuple[float, float]:
    """Milliseconds of the device with the host ahead, and from an idle device to the end."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    alone = 1e3 * (time.perf_counter() - started)
    device, _ = device_time(step, nothing, 1e-3 * alone)
    return device, alone


def nothing() -> None:
    """The gradients stay: how large they are changes no time."""


def alternating(
    context: Context, steps: dict[str, Step], rounds: int, measure: Measure
) -> dict[str, Samples]:
    """Measures all steps in turn, round after round, each round beginning with another.

    Args:
        context: Says when time is up.
        steps: By name.
        rounds: How many, after those that compile.
        measure: Returns milliseconds of the device, and from an idle device.
    """
    samples = {name: Samples() for name in steps}
    names = list(steps)
    for number in range(DROPPED + rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            context.check_time()
            device, alone = measure(steps[name])
            if number >= DROPPED:
                samples[name].device.append(device)
                samples[name].alone.append(alone)
    return samples


def add_rows(
    context: Context,
    result: SectionResult,
    model: str,
    samples: dict[str, Samples],
    launches: int,
) -> None:
    """Summarises the rounds, and judges ours beside ``torch.optim.Muon``."""
    ours = samples[OURS]
    for name, each in samples.items():
        ratio = ratio_alone = None
        if name != OURS:
            ratio, ratio_alone = ratios(ours.device, each.device), ratios(ours.alone, each.alone)
        if name == TORCH_BLOCKS and ratio is not None:
            judge(context, result, f"{model}: ours / torch.optim.Muon", ratio, LIMIT_OF_TORCH)
        row = MuonRow(
            model, name, Timing.of(each.device), Timing.of(each.alone), ratio, ratio_alone,
            launches if name == OURS else None,
        )  # fmt: skip
        result.rows.append(row)


def ratios(left: Sequence[float], right: Sequence[float]) -> Timing:
    """Ratios of the same rounds, summarised."""
    return Timing.of([a / b for a, b in zip(left, right, strict=True)])


def judge(context: Context, result: SectionResult, name: str, ratio: Timing, limit: float) -> None:
    """Keeps whether the median of a ratio is below its limit."""
    detail = f"p20 {ratio.p20:.3f}, p80 {ratio.p80:.3f}"
    passed = ratio.median < limit
    context.note(result, Check(name, "", ANY, passed, ratio.median, limit, detail))


# --------------------------------------------------------------------------------- training


def beside_training(context: Context, result: SectionResult) -> None:
    """Trains GPT-2 small in BF16, and takes our step's part of the passes before it."""
    sequences, tokens = TRAINING_BATCH
    batch = f"{sequences}x{tokens} bf16 autocast"
    needed = (4 << 30) + 6 * 4 * sequences * tokens * 50257
    if not context.has_room(result, f"share of training, {batch}", needed):
        return
    try:
        training = Training(context, sequences, tokens, mixed=True)
    except ImportError as error:
        result.skipped.append(Skip("share of training", f"transformers is not there: {error}"))
        return
    config = HybridConfig(predictor="none")
    matrices, rest = (
        HybridOptimizer([group], hybrid=config)
        for group in split_param_groups(training.model, lr=1e-4)
    )
    events: list[list[Any]] = []
    for number in range(DROPPED + ROUNDS):
        context.check_time()
        marks = [new_event() for _ in range(4)]
        marks[0].record()
        training.loss(number).backward()  # type: ignore[no-untyped-call]
        marks[1].record()
        matrices.step()
        marks[2].record()
        rest.step()
        marks[3].record()
        training.model.zero_grad(set_to_none=True)
        events.append(marks)
    torch.cuda.synchronize()
    counted = [[a.elapsed_time(b) for a, b in pairwise(m)] for m in events[DROPPED:]]
    add_share(context, result, batch, counted)


def add_share(
    context: Context, result: SectionResult, batch: str, rounds: Sequence[Sequence[float]]
) -> None:
    """Summarises rounds of milliseconds: both passes, the matrices' step, the others'."""
    passes, matrices, rest = ([each[i] for each in rounds] for i in range(3))
    share = ratios(matrices, passes)
    whole = ratios([a + b for a, b in zip(matrices, rest)], passes)
    row = ShareRow(
        batch, Timing.of(passes), Timing.of(matrices), Timing.of(rest), share, whole
    )  # fmt: skip
    result.rows.append(row)
    name = "GPT-2 small: ours / forward and backward"
    judge(context, result, name, share, LIMIT_OF_TRAINING)
