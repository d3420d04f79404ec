"""A golden record: hashes of weights and state after 60 steps, over all options that meet.

    python tests/golden.py            # compares with golden.json; exits with 1 where bits differ
    python tests/golden.py --write    # records anew, for a change of arithmetic that is meant
    python tests/golden.py --only "slow_ema adamw"

The run is a noisy quadratic with what training has in it: a loss that is observed, a learning
rate that decays, parameters without a gradient, one that is not contiguous, a gradient that is
not finite, and outliers that make the verification reject. Bits depend on the CPU (its vector
width changes the order of sums) and on the versions of torch and Triton, so the record names them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

# Both backends run on CPU tensors here; the choice must be made before triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch import Tensor

from triton_hybrid import HybridConfig, HybridOptimizer, Phase, offload

RECORD = Path(__file__).with_suffix(".json")
STEPS = 60
PREDICTORS = ("auto", "slow_ema", "linear", "none")
DTYPES = {
    "fp32": (torch.float32, "auto"),
    "fp64": (torch.float64, "auto"),
    "bf16": (torch.bfloat16, "auto"),
    "bf16-split": (torch.bfloat16, "split"),
    "bf16-none": (torch.bfloat16, "none"),
    "fp16": (torch.float16, "auto"),
    "fp16-none": (torch.float16, "none"),
}
INTERPRETED = ("fp32", "bf16", "bf16-split")
"""Precisions that the interpreter runs too; one run takes it some four seconds, with Muon ten."""

FIRST_NAMES = {"decision": "verdict"}
"""What renamed entries of the ledger were called when this was recorded: hashes follow names."""

Run = tuple[str, str, str, str, str, str]
"""Predictor, base, precision, drive, backend, offload."""


def runs() -> Iterator[Run]:
    """Every combination that is recorded."""
    drives, bases = ("inline", "stepped"), ("adamw", "muon")
    yield from itertools.product(PREDICTORS, bases, DTYPES, drives, ["torch"], ["none", "cpu"])
    alone = (["triton"], ["none"])
    yield from itertools.product(PREDICTORS, ["adamw"], INTERPRETED, drives, *alone)
    yield from itertools.product(("slow_ema", "linear"), ["muon"], ["fp32"], drives, *alone)
    adamw_alone = (["secant"], ["adamw"])
    yield from itertools.product(*adamw_alone, DTYPES, drives, ["torch"], ["none", "cpu"])
    yield from itertools.product(*adamw_alone, ["fp32"], drives, *alone)


def make_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Two matrices (one transposed in memory), a vector, a scalar, and an empty tensor."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((24, 17), (9, 33), (65,), (), (0, 4))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[1] = values[1].t().contiguous().t()
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def set_gradients(params: Sequence[Tensor], step: int, generator: torch.Generator) -> Tensor:
    """Gradients of a noisy quadratic, and its loss."""
    loss = torch.zeros((), dtype=torch.float64)
    for index, param in enumerate(params):
        place = param.detach().double()
        curvature = torch.linspace(0.3, 2.0, max(param.numel(), 1), dtype=torch.float64)
        curvature = curvature[: param.numel()].view(param.shape)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        scale = 40.0 if step in (23, 41) else 0.2
        grad = curvature * place + scale * noise
        loss += 0.5 * (curvature * place * place).sum()
        if step == 31 and index == 0:
            grad[0, 0] = math.nan
        missing = step >= 12 and step % 7 == 3 and index == 2
        param.grad = None if missing else grad.to(param.dtype)
    return loss * (50.0 if step == 36 else 1.0)


def make_optimizer(run: Run) -> HybridOptimizer:
    """The optimizer of a run, before its first step."""
    predictor, base, precision, drive, backend, home = run
    dtype, masters = DTYPES[precision]
    params = make_parameters(dtype)
    hidden, rest = params[:2], params[2:]
    groups = [{"params": hidden, "base": base}, {"params": rest, "lr": 2e-2, "weight_decay": 0.0}]
    config = HybridConfig(
        warmup_steps=4,
        full_steps=3,
        max_predict_steps=4,
        correction_interval=2,
        confidence_threshold=0.0,
        predictor=predictor,
        history=3,
        inline=drive == "inline",
        offload=home,
    )
    return HybridOptimizer(
        groups,
        lr=1e-2,
        max_grad_norm=20.0,
        master_weights=masters,
        hybrid=config,
        backend=backend,
        ns_dtype="float32",
    )


def advance(opt: HybridOptimizer, first: int, last: int) -> None:
    """Trains from one step to another."""
    params = [p for group in opt.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(5 + first)
    for step in range(first, last):
        rate = 1.0 - max(0, step - 10) / STEPS
        for group, start in zip(opt.param_groups, (1e-2, 2e-2)):
            group["lr"] = start * rate
        if opt.phase is not Phase.PREDICT:
            opt.observe_loss(set_gradients(params, step, generator))
        opt.step()
        opt.zero_grad()


def digest(*tensors: Tensor) -> str:
    """Twelve hexadecimal digits of the elements of tensors, in the order of their shapes."""
    text = hashlib.sha256()
    for tensor in tensors:
        text.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return text.hexdigest()[:12]


def record(run: Run) -> dict[str, str]:
    """Hashes of weights, of each row of state, and of the scalars that decide."""
    torch.set_num_threads(1)
    # State of CPU parameters has one memory only, and is copied here to run what serves a GPU.
    with mock.patch.object(offload, "COPY_ON_CPU", True):
        opt = make_optimizer(run)
        advance(opt, 0, STEPS)
        saved = opt.state_dict()
    return digests(opt, saved)


def digests(opt: HybridOptimizer, saved: dict[str, Any]) -> dict[str, str]:
    """The same of an optimizer and its state dict."""
    params = [p for group in opt.param_groups for p in group["params"]]
    found = {"weights": digest(*params)}
    names = sorted({name for entry in saved["state"].values() for name in entry})
    for name in names:
        every = [entry[name] for entry in saved["state"].values() if name in entry]
        found[name] = digest(*(torch.as_tensor(value).cpu() for value in every))
    progress = saved["param_groups"][0]["hybrid_progress"]
    ledger = {FIRST_NAMES.get(name, name): value for name, value in progress["ledger"].items()}
    scalars = [float(ledger[name]) for name in sorted(ledger)]
    found["ledger"] = digest(torch.tensor(scalars, dtype=torch.float64))
    counts = {phase: int(number) for phase, number in progress["steps"].items()}
    found["phases"] = " ".join(f"{phase} {number}" for phase, number in counts.items())
    return found


def surroundings() -> dict[str, str]:
    """What bits depend on."""
    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
    }


def compare(expected: dict[str, Any], name: str, found: dict[str, str]) -> list[str]:
    """What differs of one run, as lines."""
    known = expected.get(name)
    if known is None:
        return [f"{name}: not recorded"]
    keys = sorted(known.keys() | found.keys())
    wrong = [key for key in keys if known.get(key) != found.get(key)]
    return [f"{name}: {', '.join(wrong)} differ"] if wrong else []


def main() -> int:
    """Compares or records; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record instead of comparing")
    parser.add_argument("--only", default="", help="runs whose name contains these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    words = options.only.split()
    chosen = [run for run in runs() if all(word in run for word in words)]
    with ProcessPoolExecutor(options.jobs) as pool:
        found = dict(zip((" ".join(run) for run in chosen), pool.map(record, chosen)))
    if options.write:
        old = json.loads(RECORD.read_text())["runs"] if words and RECORD.exists() else {}
        lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in {**old, **found}.items()]
        where = json.dumps(surroundings())
        text = ",\n".join(lines)
        RECORD.write_text(f'{{"surroundings": {where},\n"runs": {{\n{text}\n}}}}\n', "utf-8")
        print(f"{len(found)} runs recorded in {RECORD.name}")
        return 0
    content = json.loads(RECORD.read_text())
    if content["surroundings"] != surroundings():
        print(f"recorded with {content['surroundings']}, this is {surroundings()}", flush=True)
    wrong = [line for name, one in found.items() for line in compare(content["runs"], name, one)]
    print("\n".join(wrong) or f"{len(found)} runs have the recorded bits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
