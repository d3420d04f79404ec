"""Section 2: the checks of all kernels, each dtype in a process of its own."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from suite_context import DTYPES, Context, release_memory
from suite_kernels import KernelBench, judgements
from suite_process import Child
from suite_records import Check, SectionResult
from triton_hybrid.kernels import adamw

CHECK_FLAG, ALONE_FLAG = "--check", "--two-launches"


def correctness(context: Context, result: SectionResult) -> None:
    """Runs every check for every dtype: in processes side by side, because compiling takes long.

    The interpreter compiles nothing, so there the checks run in this process.
    """
    if context.tiny:
        for label in context.dtypes:
            check_dtype(context, result, label)
        return
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for label in context.dtypes:
            flags = [CHECK_FLAG, label, "--seed", str(context.seed)]
            flags += ["--output", str(Path(folder, f"{label}.json"))]
            children[label] = Child([*flags, *([] if context.cooperative else [ALONE_FLAG])])
        try:
            for label, child in children.items():
                code = child.wait(context.deadline - time.monotonic())
                adopt(context, result, label, Path(folder, f"{label}.json"))
                name, detail = "all its checks were made", " / ".join(child.lines[-3:])
                detail = f"stopped, out of time: {detail}" if code is None else detail
                context.note(result, Check(name, "", label, code == 0, detail=detail))
                result.facts[f"seconds {label}"] = child.seconds
        finally:
            for child in children.values():
                child.stop()


def adopt(context: Context, result: SectionResult, label: str, file: Path) -> None:
    """Takes over what another process has written."""
    if not file.exists():
        return
    (section,) = json.loads(file.read_text(encoding="utf-8"))["sections"]
    for check in section["checks"]:
        # JSON has no NaN, so it stands there as text.
        check["error"] = None if check["error"] is None else float(check["error"])
        context.note(result, Check(**check))
    result.facts[f"checks of {label}"] = section["facts"]


def check_dtype(
    context: Context,
    result: SectionResult,
    label: str,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Runs every check for parameters of one dtype.

    Args:
        context: Where.
        result: Takes the checks.
        label: Of the dtype.
        after: Called whenever the checks of a kernel are complete.
    """
    if label == context.dtypes[0]:
        judgements(context, result)
    bench = KernelBench(context, result, label, DTYPES[label], context.seed)
    for kernel, check in bench.kernels().items():
        context.check_time()
        try:
            check()
        except Exception as error:
            # A kernel that does not compile must not keep the others from being checked.
            lines = str(error).splitlines() or [""]
            bench.note(kernel, "runs", False, detail=f"{type(error).__name__}: {lines[0]}")
            result.facts[f"{kernel} {label}"] = traceback.format_exc()
        release_memory()
        after()


def distrust_cooperation(context: Context) -> None:
    """Makes every later step of this process take two launches."""
    context.cooperative = False

    def never(device: torch.device) -> bool:
        return False

    adamw.cooperative_launches = never  # type: ignore[assignment]
