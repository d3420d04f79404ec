"""Freed memory stays with the process while it trains, and goes back between two runs."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAM = """
import resource, sys, torch
sys.path.insert(0, {examples!r})
import psutil
from lib.memory import keep_freed_memory, release_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    for _ in range(10):
        torch.empty(16 << 20).fill_(1.0)

resident = psutil.Process().memory_info
kept = keep_freed_memory(torch.device("cpu")) if {keep} else False
touch()
before = faults()
touch()
grown = faults() - before
held = resident().rss
release_memory()
print(int(kept), grown, held - resident().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone has mallopt")
def test_no_page_is_faulted_twice_until_memory_is_released() -> None:
    found = {}
    for keep in (False, True):
        program = PROGRAM.format(examples=str(EXAMPLES), keep=keep)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        found[keep] = [int(word) for word in done.stdout.split()]
    kept, faults, released = found[True]
    assert kept == 1
    assert faults < 1000 < found[False][1]
    assert released > 60 << 20, "64 MiB were held"
