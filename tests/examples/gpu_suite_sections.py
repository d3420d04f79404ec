"""Sections that pass, fail, hang and crash, for the tests of the GPU suite."""

from __future__ import annotations

import math
import os
import signal
import time

from gpu.context import Context, OutOfTimeError


def good(context: Context) -> None:
    print("noise")  # must not pass for a message
    context.row(answer=42, number=math.inf, nothing=None)
    context.check("holds", True, 0.0, 1e-6)


def wrong(context: Context) -> None:
    context.check("against FP64", False, math.nan, 1e-6, "why")


def bad(context: Context) -> None:
    good(context)
    raise RuntimeError("the kernel is broken\nand more")


def late(context: Context) -> None:
    context.row(first=1)
    raise OutOfTimeError


def absent(context: Context) -> None:
    context.skip("all of it", "no reason")


def hang(context: Context) -> None:
    context.row(first=1)
    time.sleep(60.0)


def crash(context: Context) -> None:
    context.row(first=1)
    os.kill(os.getpid(), signal.SIGSEGV)


def distrust(context: Context) -> None:
    from triton_hybrid.kernels.step import cooperative_launches

    context.check("two launches", not cooperative_launches(context.device))
