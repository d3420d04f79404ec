"""The grid barrier under stress, in a process of its own: a deadlock there hangs nobody else."""

from __future__ import annotations

import time

import torch
from suite_context import Context
from suite_correctness import distrust_cooperation
from suite_kernels import ADAMW_VARIANTS, run_adamw
from suite_problems import Layout, Problem, different_bits, draw
from suite_process import Child
from suite_records import Check, SectionResult, Skip
from triton_hybrid.kernels import adamw

STRESS_FLAG = "--stress-barrier"
TIMEOUT = 60.0
STEPS = 200
# Hardly any work between two barriers; the number of tensors and of chunks is no multiple of
# 16, so the later checks find the same kernels compiled.
LAYOUTS = (Layout(1), Layout(8193, shift=1), Layout(40_003), Layout(100_003, shift=3))
VARIANTS = (("adamw", torch.float32), ("adamw+clip+slow", torch.bfloat16))
"""The leanest kernel and the one with the most registers."""


def barrier(context: Context, result: SectionResult) -> None:
    """Runs `stress` in a process with a time limit; afterwards one launch is trusted or not."""
    if not adamw.cooperative_launches(context.device):
        result.skipped.append(Skip("grid barrier", "this Triton cannot launch cooperatively"))
        context.cooperative = False
        return
    # Less than the limit only where the whole suite has less.
    limit = max(15.0, min(TIMEOUT, context.deadline - time.monotonic()))
    child = Child([STRESS_FLAG, "--seed", str(context.seed)])
    code = child.wait(limit)
    detail = "" if code == 0 else " / ".join(child.lines[-3:])
    if code is None:
        detail = f"no end after {limit:.0f} s; last: {detail}"
    name = f"{len(VARIANTS)} x {2 * STEPS} consecutive cooperative steps"
    context.note(result, Check(name, "", "any", code == 0, child.seconds, limit, detail))
    result.facts.update(exit_code=code, output=child.lines[-40:])
    if code != 0:
        distrust_cooperation(context)
    result.facts["cooperative"] = context.cooperative


def stress(seed: int) -> int:
    """What the other process does. Prints where it is, so that a deadlock has a place.

    Args:
        seed: Of the random numbers.

    Returns:
        The exit status.
    """
    context = Context(torch.device("cuda", torch.cuda.current_device()), seed)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    matrix = torch.randn(2048, 2048, device=context.device)
    for name, dtype in VARIANTS:
        options = {**ADAMW_VARIANTS[name], "observed": ADAMW_VARIANTS[name]["slow_beta"] > 0}
        values = draw(LAYOUTS, context, dtype, seed)
        one, two = (Problem(LAYOUTS, values, context, dtype) for _ in range(2))
        for crowded in (False, True):
            # Programs of another kernel take multiprocessors away while the barrier waits.
            where = f"{name} {dtype} {'beside matrix products' if crowded else 'alone'}"
            print(f"{where}: compiling", flush=True)
            run_adamw(one, cooperative=True, **options)
            torch.cuda.synchronize()
            print(f"{where}: {STEPS - 1} more steps in a row", flush=True)
            started = time.perf_counter()
            for _ in range(STEPS - 1):
                if crowded:
                    with torch.cuda.stream(side):
                        torch.mm(matrix, matrix)
                run_adamw(one, cooperative=True, **options)
            torch.cuda.synchronize()
            milliseconds = 1e3 * (time.perf_counter() - started) / (STEPS - 1)
            print(f"{where}: {milliseconds:.3f} ms a step", flush=True)
        for _ in range(2 * STEPS):
            run_adamw(two, cooperative=False, **options)
        different = different_bits(one.everything(), two.everything())
        left = one.workspace.arrivals.tolist()
        print(f"{name} {dtype}: {different} elements differ, counters {left}", flush=True)
        if different or left != [0, 0]:
            return 1
    return 0
